"""The story of a run, in the order a person tells it: folder, plan, model, data, loop, end."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import data
import models
from training.checkpoint import Checkpointer, LoadedCheckpoint, Progress, Resume, StartState, decide_start
from training.config import RunConfig, TrainConfig, to_flat
from training.console import Console, logging_to
from training.distributed import World
from training.errors import EXIT_DONE, EXIT_PREEMPTED, PeerError, StoppedEarly, UserError
from training.evaluation import Evaluator
from training.feed import Feed
from training.folder import RunFolder, run_folder
from training.guard import NonFiniteGuard
from training.launch import restarts_in_vain
from training.loop import Cadence, Job, run_loop
from training.metrics import MetricsLog, read_metrics
from training.nodes import on_every_node, refuse_newer_elsewhere
from training.optimizer import describe_optimizer
from training.plan import Plan, make_plan
from training.preemption import Preemption
from training.remote import open_remote, run_remote
from training.report import Reporter
from training.rollback import Rollback, rollbacks_of
from training.saving import Saver
from training.schedule import describe_schedule, learning_rate
from training.setup import (
    Learner,
    Samples,
    build_learner,
    build_step,
    cuts_padding,
    describe_model,
    describe_resume,
    find_samples,
    load_start,
    loader_config,
    resolve_model,
    start_progress,
)
from training.shortage import Load, explained
from training.sinks import SinkSettings, build_trackers, new_wandb_id, parse_report_to
from training.start import LATEST
from training.step import TrainStep
from training.teacher import resolve_teacher
from training.trial import load_of, run_trial, wants_trial
from training.uploader import Uploader, finish_upload

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What is settled before anything is built."""

    config: TrainConfig
    world: World
    folder: RunFolder
    start: StartState
    loaded: LoadedCheckpoint | None
    model: models.ModelConfig
    teacher: models.ModelConfig | None
    samples: Samples
    plan: Plan
    progress: Progress
    cut_padding: bool


def train(config: TrainConfig, world: World, preemption: Preemption) -> int:
    """Train as `config` says. Returns the exit code; raises the errors of `training.errors` on all ranks alike."""
    folder = run_folder(config, world)
    start = find_start(config, world, folder, preemption)
    world.on_main(lambda: folder.create(config), "creating the run folder")
    with logging_to(folder.path, world.rank), errors_noted(world):
        setting = settle(config, world, folder, start)
        announce(setting)
        if end := preemption.describe():
            log.info("job: %s", end)
        evaluator = build_evaluator(setting, preemption)
        if is_complete(setting, evaluator):
            log.info("the run is complete: nothing to do")
            return EXIT_DONE
        stop_if_asked(world, preemption)
        world.pulse.enter("model")
        learner = build_learner(config, setting.model, start, setting.loaded, world)
        log.info("model: %s", describe_model(learner.model, config))
        log.info("optimiser: %s", describe_optimizer(learner.optimizer))
        stop_if_asked(world, preemption)
        load, step = prepare_step(setting, learner)
        with (
            open_feed(setting, preemption) as feed,
            open_uploader(setting, preemption) as uploader,
            open_job(setting, learner, step, feed, evaluator, uploader, preemption) as job,
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


def settle(config: TrainConfig, world: World, folder: RunFolder, start: StartState) -> Setting:
    """Model, data and numbers of the run, checked against each other. Builds nothing."""
    model = resolve_model(config)
    teacher = resolve_teacher(config.model, model)
    cut_padding = cuts_padding(config.model.text_padding, model)
    parse_report_to(config.log.report_to)
    samples = find_samples(config, world)
    plan = make_plan(config.optim, samples.per_epoch, world.size)
    loaded = load_start(start, world)
    progress = start_progress(loaded, plan)
    return Setting(config, world, folder, start, loaded, model, teacher, samples, plan, progress, cut_padding)


def announce(setting: Setting) -> None:
    """The facts of the run, of which the model's and its optimiser's are told when they are built."""
    world = setting.world
    if world.size > 1:
        log.info("world: %s; %s", world.roll.summary, world.backend)
    else:
        log.info("world: 1 rank (%s), %s", world.launcher, world.device)
    for warning in launch_warnings(setting):
        log.warning("%s", warning)
    log.info("plan: %s", setting.plan)
    log.info("learning rate: %s", describe_schedule(setting.config.optim, setting.plan))
    log.info("start: %s", setting.start.reason)
    if setting.loaded and (change := describe_resume(setting.loaded, setting.config, setting.plan)):
        log.info("changed since the checkpoint: %s", change)
    log.info("folder: %s", setting.folder.path)
    for line in describe_copy(setting.config.run):
        log.info("%s", line)


def describe_copy(run: RunConfig) -> Iterator[str]:
    """Where the second copy of the run goes, and which flags about it change nothing."""
    if run.remote_sync is not None:
        yield f"remote: {run.remote_sync.rstrip('/')}"
    if run.remote_sync_protocol is not None:
        yield "--remote-sync-protocol has no effect: the protocol is in the URL of --remote-sync"


def launch_warnings(setting: Setting) -> list[str]:
    """What looks wrong in how the ranks were started. Said once: other ranks' consoles show warnings too."""
    vain = restarts_in_vain(os.environ, setting.config.run.resume)
    return [warning for warning in (*setting.world.roll.warnings, vain) if warning and setting.world.is_main]


def build_evaluator(setting: Setting, preemption: Preemption) -> Evaluator:
    """Checks the evaluation sets at once, so that a wrong path does not cost an epoch."""
    config = setting.config
    return Evaluator(
        config.eval,
        config.data,
        models.get_tokenizer(setting.model),
        models.InferenceTransform(setting.model.preprocess),
        setting.world,
        batch_size=config.optim.batch_size,
        workers=config.data.workers,
        should_stop=lambda: preemption.requested() is not None,
        precision=config.model.precision,
    )


def is_complete(setting: Setting, evaluator: Evaluator) -> bool:
    """True when nothing is left to train or to evaluate."""
    return setting.progress.step >= setting.plan.total_steps and not evaluation_missing(setting, evaluator)


def evaluation_missing(setting: Setting, evaluator: Evaluator) -> bool:
    """True when the start is the end of an epoch whose evaluation was cut off."""
    step, plan = setting.progress.step, setting.plan
    if step == 0 or not plan.ends_epoch(step):
        return False
    if not evaluator.due(plan.epoch_of(step), step >= plan.total_steps):
        return False
    return not setting.world.on_main(lambda: _was_evaluated(setting.folder, step))


def _was_evaluated(folder: RunFolder, step: int) -> bool:
    if not folder.metrics.exists():
        return False
    records = (record for record in read_metrics(folder.metrics) if record["step"] == step)
    return any(name.startswith("val/") for record in records for name in record)


def prepare_step(setting: Setting, learner: Learner) -> tuple[Load, TrainStep]:
    """The step and what it has to hold, tried before the loader's processes start."""
    config, world = setting.config, setting.world
    settings = loader_config(config, setting.samples, setting.plan, setting.model)
    load = load_of(config, learner.model, settings, world)
    with explained(load):
        step = build_step(config, learner, settings, setting.model, setting.teacher, setting.cut_padding, world)
        if wants_trial(config.run.trial_step, world.device):
            run_trial(step, settings, setting.model)  # Collective:
    return load, step


@contextmanager
def open_feed(setting: Setting, preemption: Preemption) -> Iterator[Feed]:
    """Batches from where the run goes on; the loader's processes end with the context."""
    config, world = setting.config, setting.world
    settings = loader_config(config, setting.samples, setting.plan, setting.model)
    tokenizer = models.get_tokenizer(setting.model)
    if config.data.preflight:
        world.pulse.enter("preflight")
        report = world.on_main(lambda: data.run_preflight(settings, tokenizer), "--train-data")
        log.info("data: %s", report)
    position = data.Position.from_json(setting.loaded.data_position) if setting.loaded else None
    loader = data.build_train_loader(settings, tokenizer, world.rank, world.size, position)
    world.pulse.watch(loader.workers)
    counts = setting.loaded.state.get("counts") if setting.loaded else None
    sizes = setting.samples.catalog.source_sizes
    with closing(Feed(loader, world, lambda: preemption.requested() is not None, counts, sizes)) as feed:
        yield feed


@contextmanager
def open_uploader(setting: Setting, preemption: Preemption) -> Iterator[Uploader | None]:
    """What keeps the copy at the remote, on rank 0 only."""
    run, folder = setting.config.run, setting.folder
    if run.remote_sync is None or not setting.world.is_main:
        yield None
        return
    uploader = Uploader(
        run_remote(run.remote_sync, folder.path.name),
        folder.path,
        keep_last=run.keep_last,
        delete_previous=run.delete_previous_checkpoint,
        every_s=run.remote_sync_frequency,
        on_uploaded=partial(preemption.allow_for, "upload"),
    )
    with uploader:
        yield uploader


@contextmanager
def open_job(
    setting: Setting,
    learner: Learner,
    train_step: TrainStep,
    feed: Feed,
    evaluator: Evaluator,
    uploader: Uploader | None,
    preemption: Preemption,
) -> Iterator[Job]:
    """Everything that the loop calls; files and trackers are closed on every path."""
    config, world, plan, step = setting.config, setting.world, setting.plan, setting.progress.step
    wandb_id = (setting.loaded.state.get("wandb_run_id") if setting.loaded else None) or new_wandb_id()
    with (
        Console(config.log.progress, plan.total_steps, step, world.is_main) as console,
        open_metrics(setting, wandb_id) as metrics,
        open_checkpointer(setting, uploader, preemption, metrics) as checkpointer,
    ):
        reporter = Reporter(metrics, console, plan, world, config.log.log_every_n_steps)
        extra = {"wandb_run_id": wandb_id, "rollbacks": rollbacks_of(setting.loaded)}
        saver = Saver(
            *(checkpointer, learner.model, learner.optimizer, config, plan, world, extra),
            loss_scale=learner.loss_scale,
            start_step=step,
        )

        def evaluate(done: int) -> bool:
            figures = evaluator.evaluate(learner.wrapped, epoch=plan.epoch_of(done), is_last=done >= plan.total_steps)
            reporter.evaluation(done, figures or {})
            return figures is not None

        job = Job(
            plan=plan,
            start_step=step,
            step=train_step,
            rate=lambda done: learning_rate(config.optim, plan, done),
            feed=feed,
            guard=NonFiniteGuard(config.optim, world, reporter.event),
            reporter=reporter,
            saver=saver,
            roll_back=build_rollback(setting, learner, saver, reporter, feed, uploader),
            evaluate=evaluate,
            evaluate_first=evaluation_missing(setting, evaluator),
            cadence=Cadence(config.run, plan, step),
            settle=world.settle,
        )
        yield job


def build_rollback(
    setting: Setting, learner: Learner, saver: Saver, reporter: Reporter, feed: Feed, uploader: Uploader | None
) -> Rollback:
    """The way back to an earlier checkpoint."""
    return Rollback(
        world=setting.world,
        plan=setting.plan,
        learner=learner,
        saver=saver,
        reporter=reporter,
        feed=feed,
        directory=setting.folder.checkpoints,
        start=setting.loaded.folder if setting.loaded else None,
        limit=setting.config.optim.max_rollbacks,
        num_done=rollbacks_of(setting.loaded),
        uploader=uploader,
    )


def open_checkpointer(
    setting: Setting, uploader: Uploader | None, preemption: Preemption, metrics: MetricsLog | None
) -> Checkpointer:
    """The writer of the run's checkpoints; it cleans up what a killed one left behind."""
    run, world = setting.config.run, setting.world
    with world.collectively("opening the checkpoint folder"):
        return Checkpointer(
            setting.folder.checkpoints,
            world,
            keep_last=run.keep_last,
            delete_previous=run.delete_previous_checkpoint,
            uploader=uploader,
            # A resume cuts the numbers off at its checkpoint: those up to there must not be lost with the machine.
            before_write=None if metrics is None else metrics.sync,
            on_saved=partial(preemption.allow_for, "save"),
        )


@contextmanager
def open_metrics(setting: Setting, wandb_id: str) -> Iterator[MetricsLog | None]:
    """The run's metrics file with its trackers behind it, on rank 0 only."""
    if not setting.world.is_main:
        yield None
        return
    config = setting.config
    resume_step = setting.progress.step if setting.loaded else None
    settings = SinkSettings(
        run_dir=setting.folder.path,
        run_name=setting.folder.path.name,
        config=to_flat(config),
        resume_step=resume_step,
        wandb_run_id=wandb_id,
        wandb_project=config.log.wandb_project_name,
        wandb_notes=config.log.wandb_notes,
    )
    with (
        closing(build_trackers(parse_report_to(config.log.report_to), settings)) as trackers,
        MetricsLog(setting.folder.path, resume_step, trackers) as metrics,
    ):
        yield metrics
