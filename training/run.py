"""The story of a run, in the order a person tells it: folder, plan, model, data, loop, end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from training.config import TrainConfig
from training.console import logging_to
from training.distributed import World
from training.errors import EXIT_DONE, EXIT_PREEMPTED, PeerError, StoppedEarly, UserError
from training.evaluation import Evaluator
from training.facts import Facts, announce, settle
from training.folder import RunFolder, run_folder
from training.learner import build_learner
from training.loop import run_loop
from training.nodes import on_every_node, refuse_newer_elsewhere
from training.opening import build_evaluator, evaluation_missing, open_feed, open_job, open_uploader, prepare_step
from training.optimizer import describe_optimizer
from training.preemption import Preemption
from training.remote import open_remote, run_remote
from training.setup import describe_model
from training.shortage import explained
from training.start import LATEST, Resume, StartState, decide_start
from training.uploader import finish_upload

log = logging.getLogger(__name__)


def train(config: TrainConfig, world: World, preemption: Preemption) -> int:
    """Train as `config` says. Returns the exit code; raises the errors of `training.errors` on all ranks alike."""
    folder = run_folder(config, world)
    start = find_start(config, world, folder, preemption)
    world.on_main(lambda: folder.create(config), "creating the run folder")
    with logging_to(folder.path, world.rank), errors_noted(world):
        facts = settle(config, world, folder, start)
        announce(facts)
        if end := preemption.describe():
            log.info("job: %s", end)
        evaluator = build_evaluator(facts, preemption)
        if is_complete(facts, evaluator):
            log.info("the run is complete: nothing to do")
            return EXIT_DONE
        stop_if_asked(world, preemption)
        world.pulse.enter("model")
        learner = build_learner(config, facts.model, start, facts.loaded, world)
        log.info("model: %s", describe_model(learner.model, config))
        log.info("optimiser: %s", describe_optimizer(learner.optimizer))
        stop_if_asked(world, preemption)
        load, step = prepare_step(facts, learner)
        with (
            open_feed(facts, preemption) as feed,
            open_uploader(facts, preemption) as uploader,
            open_job(facts, learner, step, feed, evaluator, uploader, preemption) as job,
        ):
            with explained(load, in_training=True):
                finished = run_loop(job)
            job.saver.finish()
            world.pulse.enter("upload")
            missing = finish_upload(uploader, world, preemption)
            world.pulse.enter("end")
        end = "done" if finished else f"stopped ({preemption.requested() or 'as asked'}), everything is saved"
        log.info("%s%s", end, missing and f"; {missing}")
    return EXIT_DONE if finished else EXIT_PREEMPTED


def stop_if_asked(world: World, preemption: Preemption) -> None:
    """Raises StoppedEarly on all ranks when any of them was asked to stop. Collective."""
    if world.any(preemption.requested() is not None):  # Collective:
        raise StoppedEarly(preemption.requested() or "another rank was asked to")


@contextmanager
def stop_noted(level: int) -> Iterator[None]:
    """A stop before the first step leaves a line."""
    try:
        yield
    except StoppedEarly as stop:
        log.log(level, "stopped%s before the first step: there is nothing to save", f" ({stop})" if str(stop) else "")
        raise


@contextmanager
def errors_noted(world: World) -> Iterator[None]:
    """Errors on their way to the console leave a line in train.log too."""
    try:
        with stop_noted(logging.INFO):
            yield
    except StoppedEarly:
        raise
    except Exception as raised:
        error = world.explained(raised)
        unforeseen = not isinstance(error, (*UserError, PeerError))
        log.error("%s: %s", type(error).__name__, error, exc_info=unforeseen, extra={"file_only": True})
        if error is raised:
            raise
        raise error from raised


def find_start(config: TrainConfig, world: World, folder: RunFolder, preemption: Preemption) -> StartState:
    """Where the run begins, here or at its remote; a remote that cannot be used is refused here."""
    url = config.run.remote_sync
    with stop_noted(logging.WARNING if world.is_main else logging.DEBUG):  # no log file yet, and no console of ours
        start = decide_start(
            world,
            folder.path,
            resume=config.run.resume,
            pretrained=config.model.pretrained,
            opener=None if url is None else partial(open_remote, url, folder.path.name, folder.path),
            should_stop=lambda: preemption.requested() is not None,
        )
    remote = None if url is None else run_remote(url, folder.path.name)
    if config.run.resume == LATEST:
        refuse_newer_elsewhere(world, start, folder.path, remote)
    if isinstance(start, Resume):
        return replace(start, folder=on_every_node(world, start.folder, folder.path, remote))
    return start


def is_complete(facts: Facts, evaluator: Evaluator) -> bool:
    """True when nothing is left to train or to evaluate."""
    return facts.progress.step >= facts.plan.total_steps and not evaluation_missing(facts, evaluator)
