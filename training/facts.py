"""The facts of a run: what is settled before anything is built, checked against each other, and told."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import models
from training.checkpoint_content import LoadedCheckpoint, Progress
from training.config import RunConfig, TrainConfig
from training.distributed import World
from training.evaluation.schedule import check_cadences
from training.folder import RunFolder
from training.launch import restarts_in_vain
from training.origin import open_tokenizer, read_origin, tell_preprocess
from training.plan import Plan, make_plan
from training.schedule import describe_schedule
from training.setup import (
    Samples,
    cuts_padding,
    describe_resume,
    find_samples,
    load_start,
    resolve_model,
    start_progress,
)
from training.sinks import parse_report_to
from training.start import StartState
from training.teacher import resolve_teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What is settled before anything is built."""

    config: TrainConfig
    world: World
    folder: RunFolder
    start: StartState
    loaded: LoadedCheckpoint | None
    model: models.ModelConfig
    tokenizer: models.Tokenizer
    teacher: models.ModelConfig | None
    samples: Samples
    plan: Plan
    progress: Progress
    cut_padding: bool


def settle(config: TrainConfig, world: World, folder: RunFolder, start: StartState) -> Facts:
    """Model, data and numbers of the run, checked against each other. Builds nothing."""
    loaded = load_start(start, world)
    origin = read_origin(start, loaded, world)
    model = resolve_model(config, origin)
    tell_preprocess(model, models.load_model_config(config.model.model), origin)
    tokenizer = open_tokenizer(model, origin, world, must_equal=loaded is not None)
    teacher = resolve_teacher(config.model, model)
    cut_padding = cuts_padding(config.model.text_padding, model)
    parse_report_to(config.log.report_to)
    samples = find_samples(config, world)
    plan = make_plan(config.optim, samples.per_epoch, world.size)
    check_cadences(config.eval, plan)
    progress = start_progress(loaded, plan)
    return Facts(config, world, folder, start, loaded, model, tokenizer, teacher, samples, plan, progress, cut_padding)


def announce(facts: Facts) -> None:
    """The facts of the run, of which the model's and its optimiser's are told when they are built."""
    world = facts.world
    if world.size > 1:
        log.info("world: %s; %s", world.roll.summary, world.backend)
    else:
        log.info("world: 1 rank (%s), %s", world.launcher, world.device)
    for warning in launch_warnings(facts):
        log.warning("%s", warning)
    log.info("plan: %s", facts.plan)
    log.info("learning rate: %s", describe_schedule(facts.config.optim, facts.plan))
    log.info("start: %s", facts.start.reason)
    if facts.loaded and (change := describe_resume(facts.loaded, facts.config, facts.plan)):
        log.info("changed since the checkpoint: %s", change)
    log.info("folder: %s", facts.folder.path)
    for line in describe_copy(facts.config.run):
        log.info("%s", line)


def describe_copy(run: RunConfig) -> Iterator[str]:
    """Where the second copy of the run goes, and which flags about it change nothing."""
    if run.remote_sync is not None:
        yield f"remote: {run.remote_sync.rstrip('/')}"
    if run.remote_sync_protocol is not None:
        yield "--remote-sync-protocol has no effect: the protocol is in the URL of --remote-sync"


def launch_warnings(facts: Facts) -> list[str]:
    """What looks wrong in how the ranks were started. Said once: other ranks' consoles show warnings too."""
    vain = restarts_in_vain(os.environ, facts.config.run.resume)
    return [warning for warning in (*facts.world.roll.warnings, vain) if warning and facts.world.is_main]
