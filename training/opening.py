"""What the loop works with, opened from the settled facts, and closed on every path. Knows no order of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import data
import models
from training.checkpoint import Checkpointer
from training.config import to_flat
from training.console import Console
from training.evaluation import Evaluator
from training.evaluation.schedule import check_sets, describe_cadences, due_after
from training.facts import Facts
from training.feed import Feed
from training.folder import RunFolder
from training.guard import NonFiniteGuard
from training.learner import Learner
from training.loop import Cadence, Job
from training.metrics import MetricsLog, read_metrics
from training.preemption import Preemption
from training.remote import run_remote
from training.report import Reporter
from training.rollback import Rollback, rollbacks_of
from training.saving import Saver
from training.schedule import learning_rate
from training.setup import build_step, loader_config
from training.shortage import Load, explained
from training.sinks import SinkSettings, build_trackers, new_wandb_id, parse_report_to
from training.step import TrainStep
from training.trial import load_of, run_trial, wants_trial
from training.uploader import Uploader

log = logging.getLogger(__name__)


def build_evaluator(facts: Facts, preemption: Preemption) -> Evaluator:
    """Checks the evaluation sets at once, so that a wrong path does not cost an epoch."""
    config = facts.config
    evaluator = Evaluator(
        config.eval,
        config.data,
        facts.tokenizer,
        models.InferenceTransform(facts.model.preprocess),
        facts.world,
        batch_size=config.optim.batch_size,
        workers=config.data.workers,
        should_stop=lambda: preemption.requested() is not None,
        precision=config.model.precision,
    )
    check_sets(config.eval, bool(evaluator.labels(val=False)), bool(evaluator.labels(zeroshot=False)))
    if evaluator.labels():
        log.info("evaluation: %s", describe_cadences(config.eval))
    return evaluator


def due_sets(facts: Facts, evaluator: Evaluator, step: int) -> list[str]:
    """The sets that are to be evaluated after `step` steps."""
    due = due_after(facts.config.eval, facts.plan, step)
    return evaluator.labels(zeroshot=due.zeroshot, val=due.val)


def evaluate_learner(evaluator: Evaluator, learner: Learner, labels: list[str]) -> dict[str, float] | None:
    """The figures of the weights and, under `val/ema/`, of their average. None when stopped. Collective."""
    figures = evaluator.evaluate_sets(learner.wrapped, labels)
    if not figures or learner.ema is None:
        return figures
    log.info("the same of the averaged weights:")
    with learner.ema.in_place_of_weights():
        averaged = evaluator.evaluate_sets(learner.wrapped, labels)
    if averaged is None:
        return None
    return figures | {name.replace("val/", "val/ema/", 1): value for name, value in averaged.items()}


def evaluation_missing(facts: Facts, evaluator: Evaluator) -> bool:
    """True when an evaluation was due where the run begins, and was cut off or is the first of all."""
    loaded, progress = facts.loaded, facts.progress
    if loaded is not None and progress.step == 0:
        return False  # A larger global batch has made no step of the samples seen: the first evaluation was before.
    if not due_sets(facts, evaluator, progress.step):
        return False
    # By samples: another global batch numbers the steps anew.
    return loaded is None or not facts.world.on_main(lambda: _was_evaluated(facts.folder, progress.samples_seen))


def _was_evaluated(folder: RunFolder, samples_seen: int) -> bool:
    if not folder.metrics.exists():
        return False
    records = (record for record in read_metrics(folder.metrics) if record.get("samples_seen") == samples_seen)
    return any(name.startswith("val/") for record in records for name in record)


def prepare_step(facts: Facts, learner: Learner) -> tuple[Load, TrainStep]:
    """The step and what it has to hold, tried before the loader's processes start."""
    config, world = facts.config, facts.world
    settings = loader_config(config, facts.samples, facts.plan, facts.model)
    load = load_of(config, learner.model, settings, world)
    with explained(load):
        step = build_step(config, learner, settings, facts.model, facts.teacher, facts.cut_padding, world)
        if wants_trial(config.run.trial_step, world.device):
            run_trial(step, settings, facts.model)  # Collective:
    return load, step


@contextmanager
def open_feed(facts: Facts, preemption: Preemption) -> Iterator[Feed]:
    """Batches from where the run goes on; the loader's processes end with the context."""
    config, world = facts.config, facts.world
    settings = loader_config(config, facts.samples, facts.plan, facts.model)
    tokenizer = facts.tokenizer
    if config.data.preflight:
        world.pulse.enter("preflight")
        report = world.on_main(lambda: data.run_preflight(settings, tokenizer), "--train-data")
        log.info("data: %s", report)
    position = data.Position.from_json(facts.loaded.data_position) if facts.loaded else None
    loader = data.build_train_loader(settings, tokenizer, world.rank, world.size, position)
    world.pulse.watch(loader.workers)
    counts = facts.loaded.state.get("counts") if facts.loaded else None
    sizes = facts.samples.catalog.source_sizes
    with closing(Feed(loader, world, lambda: preemption.requested() is not None, counts, sizes)) as feed:
        yield feed


@contextmanager
def open_uploader(facts: Facts, preemption: Preemption) -> Iterator[Uploader | None]:
    """What keeps the copy at the remote, on rank 0 only."""
    run, folder = facts.config.run, facts.folder
    if run.remote_sync is None or not facts.world.is_main:
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
    facts: Facts,
    learner: Learner,
    train_step: TrainStep,
    feed: Feed,
    evaluator: Evaluator,
    uploader: Uploader | None,
    preemption: Preemption,
) -> Iterator[Job]:
    """Everything that the loop calls; files and trackers are closed on every path."""
    config, world, plan, step = facts.config, facts.world, facts.plan, facts.progress.step
    wandb_id = (facts.loaded.state.get("wandb_run_id") if facts.loaded else None) or new_wandb_id()
    with (
        Console(config.log.progress, plan.total_steps, step, world.is_main) as console,
        open_metrics(facts, wandb_id) as metrics,
        open_checkpointer(facts, uploader, preemption, metrics) as checkpointer,
    ):
        reporter = Reporter(metrics, console, plan, world, config.log.log_every_n_steps, preemption.job_time)
        extra = {"wandb_run_id": wandb_id, "rollbacks": rollbacks_of(facts.loaded)}
        saver = Saver(
            *(checkpointer, learner.model, learner.optimizer, config, plan, world, extra),
            loss_scale=learner.loss_scale,
            start_step=step,
            ema=learner.ema,
            tokenizer=models.TokenizerIdentity.of(facts.tokenizer),
        )

        guard = NonFiniteGuard(config.optim, world, reporter.event)

        def evaluate(done: int) -> bool:
            if not (labels := due_sets(facts, evaluator, done)):
                return True
            # Host sync: the step that still runs is no part of the evaluation's time.
            guard.settle()
            with reporter.pause("evaluation", done):
                figures = evaluate_learner(evaluator, learner, labels)
            reporter.evaluation(done, figures or {})
            return figures is not None

        job = Job(
            plan=plan,
            start_step=step,
            step=train_step,
            rate=lambda done: learning_rate(config.optim, plan, done),
            feed=feed,
            guard=guard,
            reporter=reporter,
            saver=saver,
            roll_back=build_rollback(facts, learner, saver, reporter, feed, uploader),
            evaluate=evaluate,
            evaluate_first=evaluation_missing(facts, evaluator),
            cadence=Cadence(config.run, plan, step),
            settle=world.settle,
        )
        yield job


def build_rollback(
    facts: Facts, learner: Learner, saver: Saver, reporter: Reporter, feed: Feed, uploader: Uploader | None
) -> Rollback:
    """The way back to an earlier checkpoint."""
    return Rollback(
        world=facts.world,
        plan=facts.plan,
        learner=learner,
        saver=saver,
        reporter=reporter,
        feed=feed,
        directory=facts.folder.checkpoints,
        start=facts.loaded.folder if facts.loaded else None,
        limit=facts.config.optim.max_rollbacks,
        num_done=rollbacks_of(facts.loaded),
        uploader=uploader,
    )


def open_checkpointer(
    facts: Facts, uploader: Uploader | None, preemption: Preemption, metrics: MetricsLog | None
) -> Checkpointer:
    """The writer of the run's checkpoints; it cleans up what a killed one left behind."""
    run, world = facts.config.run, facts.world
    with world.collectively("opening the checkpoint folder"):
        return Checkpointer(
            facts.folder.checkpoints,
            world,
            keep_last=run.keep_last,
            delete_previous=run.delete_previous_checkpoint,
            uploader=uploader,
            # A resume cuts the numbers off at its checkpoint: those up to there must not be lost with the machine.
            before_write=None if metrics is None else metrics.sync,
            on_saved=partial(preemption.allow_for, "save"),
        )


@contextmanager
def open_metrics(facts: Facts, wandb_id: str) -> Iterator[MetricsLog | None]:
    """The run's metrics file with its trackers behind it, on rank 0 only."""
    if not facts.world.is_main:
        yield None
        return
    config = facts.config
    resume_step = facts.progress.step if facts.loaded else None
    settings = SinkSettings(
        run_dir=facts.folder.path,
        run_name=facts.folder.path.name,
        config=to_flat(config),
        resume_step=resume_step,
        wandb_run_id=wandb_id,
        wandb_project=config.log.wandb_project_name,
        wandb_notes=config.log.wandb_notes,
    )
    with (
        closing(build_trackers(parse_report_to(config.log.report_to), settings)) as trackers,
        MetricsLog(facts.folder.path, resume_step, trackers) as metrics,
    ):
        yield metrics
