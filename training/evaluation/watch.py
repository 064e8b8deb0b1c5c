"""Evaluation beside training: each new checkpoint of a run, on other machines than its trainer's.

The story of such a process, which all its ranks tell together: look at the run, bring a checkpoint, measure, note,
wait. Which checkpoint is next is `training.evaluation.lookout`'s business; what rank 0 alone reads and writes is its
desk's.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import models
from training.checkpoint_content import MODEL_CONFIG_FILE, STATE_FILE
from training.distributed import Errand, World
from training.errors import EXIT_DONE, EXIT_FAILED, CheckpointError, RemoteError, StoppedEarly, first_line
from training.evaluation.desk import Desk, Verdict, WatchConfig, open_desk
from training.evaluation.evaluator import Evaluator, open_tasks
from training.evaluation.exam import Exam
from training.evaluation.ledger import Measurement
from training.evaluation.lookout import Arrival, View
from training.evaluation.standalone import load_model, open_evaluator
from training.evaluation.tasks import Task
from training.evaluation.watched import WatchedRun, open_run
from training.manifest import read_manifest_text

log = logging.getLogger(__name__)

T = TypeVar("T")

_ASKING_S = 0.2


def watch(config: WatchConfig, exam: Exam, world: World, should_stop: Callable[[], bool]) -> int:
    """Evaluate until the run is complete, or as long as `config.choice` says. Returns the exit code. Collective.

    Raises StoppedEarly when a rank is asked to stop, ConfigError for settings, sets or a tokenizer that do not fit.
    """
    config.check()
    exam.check()
    # Now: a wrong path must not wait for the first checkpoint.
    tasks = open_tasks(exam.sets, exam.data, world)
    run = open_run(config.run, config.scratch, config.output)
    if not _await_run(run, config, world, should_stop):
        return EXIT_DONE
    with open_desk(config, run, measurements(tasks, config.averaged), world, should_stop) as desk:
        return Watch(config, exam, tasks, run, world, should_stop, desk).run()


def measurements(tasks: Mapping[str, Task], averaged: bool) -> list[Measurement]:
    """All that is to be measured of a checkpoint."""
    kinds = (False, True) if averaged else (False,)
    return [Measurement(label, task.prompts_sha256, kind) for kind in kinds for label, task in tasks.items()]


def _await_run(run: WatchedRun, config: WatchConfig, world: World, should_stop: Callable[[], bool]) -> bool:
    """True when there is a folder for the figures; False when it has not come in time."""
    began, is_told = time.monotonic(), False
    while not world.on_main(lambda: config.output is not None or config.is_there(run), "RUN"):
        if world.on_main(lambda: config.choice.is_idle_since(began)):
            log.info("no run %s has come: nothing to evaluate", run.name)
            return False
        if not is_told:
            log.info("waiting for the run %s to begin", run.name)
            is_told = True
        pause(config.interval_s, world, should_stop)
    return True


class _PassedOver(Exception):
    """A checkpoint cannot be evaluated, or not now; raised on all ranks together, when that has been told."""

    def __init__(self, again: bool):
        super().__init__()
        self.again = again


class Watch:
    """One process of such an evaluation, one of its ranks. `desk` is there on rank 0 only."""

    def __init__(
        self,
        config: WatchConfig,
        exam: Exam,
        tasks: dict[str, Task],
        run: WatchedRun,
        world: World,
        should_stop: Callable[[], bool],
        desk: Desk | None,
    ):
        self._config, self._exam, self._tasks = config, exam, tasks
        self._run, self._world, self._should_stop, self._desk = run, world, should_stop, desk
        self._evaluator: tuple[str, Evaluator] | None = None

    def run(self) -> int:
        """The exit code. Raises StoppedEarly on all ranks when one is asked to stop."""
        while True:
            self._world.pulse.enter("look")
            view = self._world.on_main_at_length(self._look, "RUN", self._should_stop)
            is_done = all([self._evaluate(arrival) for arrival in view.arrivals])
            if view.end or (self._config.choice.once and view.arrivals):
                break
            if not view.arrivals or not is_done:
                self._world.pulse.enter("wait")
                pause(self._config.interval_s, self._world, self._should_stop)
        failed = self._world.on_main(lambda: self._on_desk.lookout.num_failed())
        trouble = f"; {failed} of its checkpoints could not be evaluated as asked, see above" if failed else ""
        log.info("%s%s", view.end or "what was there has been looked at", trouble)
        return EXIT_FAILED if failed else EXIT_DONE

    @property
    def _on_desk(self) -> Desk:
        assert self._desk is not None, "rank 0 alone has a desk"
        return self._desk

    def _look(self) -> View:
        return self._on_desk.look()

    # ---- one checkpoint

    def _evaluate(self, arrival: Arrival) -> bool:
        """False when a later try may do what this one has not done. Collective."""
        try:
            self._bring(arrival)
            return all([self._evaluate_weights(arrival, averaged) for averaged in (False, True)])
        except _PassedOver as passed:
            return not passed.again
        finally:
            if self._world.local_rank == 0:
                self._run.let_go()

    def _evaluate_weights(self, arrival: Arrival, averaged: bool) -> bool:
        missing = [one for one in arrival.missing if one.averaged is averaged]
        if not missing:
            return True
        self._world.pulse.enter(f"load {arrival.name}")
        model = self._tried(arrival, lambda: self._load(arrival, averaged))
        if self._desk is not None:
            self._desk.loaded(arrival)
        evaluator = self._evaluator_of(arrival, model)
        return all([self._measure(arrival, one, model, evaluator) for one in missing])

    def _bring(self, arrival: Arrival) -> None:
        """Have the files on every node; one rank of each sees to it."""
        self._world.pulse.enter(f"fetch {arrival.name}")
        files = {MODEL_CONFIG_FILE, STATE_FILE, *(one.file for one in arrival.missing)}
        errand: Errand[object] | None = None
        if self._world.local_rank == 0:
            errand = Errand(lambda: self._run.bring(arrival.name, files), "fetch")
        self._world.wait_for(lambda seconds: errand is None or errand.is_done(seconds), self._should_stop)
        self._tried(arrival, lambda: None if errand is None else errand.result())

    def _load(self, arrival: Arrival, averaged: bool) -> models.CLIP:
        folder = self._run.path_of(arrival.name)
        if read_manifest_text(folder) != arrival.text:
            raise RemoteError(f"{socket.gethostname()} does not see {folder} as rank 0 does")
        return load_model(str(folder), None, self._world, averaged)

    def _evaluator_of(self, arrival: Arrival, model: models.CLIP) -> Evaluator:
        """The one of the last checkpoint, as long as the model is of the same configuration. Collective."""
        folder = self._run.path_of(arrival.name)
        text = self._tried(arrival, (folder / MODEL_CONFIG_FILE).read_text)
        if self._evaluator is None or self._evaluator[0] != text:
            origin = self._tried(arrival, lambda: models.read_provenance(str(folder)))
            evaluator = open_evaluator(
                *(model.config, origin, self._exam, self._world, self._config.tokenizer, self._should_stop),
                tasks=self._tasks,
            )
            self._evaluator = text, evaluator
        return self._evaluator[1]

    def _measure(self, arrival: Arrival, one: Measurement, model: models.CLIP, evaluator: Evaluator) -> bool:
        """False when the set could not be read. Collective."""
        figures = evaluator.evaluate_sets(model, [one.set_name])
        if figures is None:
            raise StoppedEarly
        with self._world.collectively("writing evaluations.jsonl"):
            if self._desk is not None:
                self._desk.note(arrival, one, figures)
        return bool(figures)

    # ---- what may be wrong with it

    def _tried(self, arrival: Arrival, work: Callable[[], T]) -> T:
        """What `work` returns on this rank; _PassedOver on all of them where it fails on one. Collective.

        An error that is not the checkpoint's is raised as it is, on the other ranks as a PeerError.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        reports = self._world.all_gather_object(None if error is None else (_severity(error), first_line(error)))
        told = [report for report in reports if report is not None]
        if not told:
            return result  # type: ignore[return-value]
        verdict = self._world.on_main(lambda: self._on_desk.judge(arrival, *max(told)))
        if verdict is Verdict.REFUSED:
            with self._world.collectively(f"evaluating {arrival}"):
                if error is not None:
                    raise error
        raise _PassedOver(again=verdict is Verdict.UNSEEN)


def _severity(error: Exception) -> Verdict:
    if isinstance(error, RemoteError):
        return Verdict.UNSEEN
    return Verdict.DAMAGED if isinstance(error, CheckpointError | OSError) else Verdict.REFUSED


def pause(seconds: float, world: World, should_stop: Callable[[], bool]) -> None:
    """Wait on all ranks. Raises StoppedEarly on all of them when one is asked to stop. Collective."""
    deadline = time.monotonic() + seconds

    def is_over(within_s: float) -> bool:
        until = min(deadline, time.monotonic() + within_s)
        while (left := until - time.monotonic()) > 0 and not should_stop():
            time.sleep(min(_ASKING_S, left))
        return time.monotonic() >= deadline

    world.wait_for(is_over, should_stop)
