"""What a run measures: opens its sets at the start, evaluates those that it is told to, names the figures."""

from __future__ import annotations

import logging
import time

from torch import nn

from models import InferenceTransform
from training.config import DataConfig, EvalConfig
from training.distributed import World
from training.errors import DataConfigError, DataError
from training.evaluation.features import Tokenize
from training.evaluation.feed import ShouldStop, Stopped
from training.evaluation.figures import Figure, values_of
from training.evaluation.specs import PAIRS, specs_of
from training.evaluation.tasks import Bench, Task, ZeroshotTask, open_task

log = logging.getLogger(__name__)


class Evaluator:
    """The evaluation of a run.

    Construction is collective and reads the first samples of every set: raises ConfigError or DataConfigError
    for one that cannot be evaluated, saying what would be right. `tasks`, if given, are those that
    `open_tasks` opened already.
    """

    def __init__(
        self,
        config: EvalConfig,
        data: DataConfig,
        tokenizer: Tokenize,
        preprocess: InferenceTransform,
        world: World,
        batch_size: int = 64,
        workers: int = 4,
        should_stop: ShouldStop | None = None,
        precision: str = "amp_bfloat16",
        tasks: dict[str, Task] | None = None,
    ):
        self._world = world
        self._bench = Bench(tokenizer, preprocess, world, batch_size, workers, should_stop, precision)
        self._tasks = open_tasks(config, data, world) if tasks is None else tasks

    @property
    def tasks(self) -> dict[str, Task]:
        """What can be measured, by the labels of the sets."""
        return dict(self._tasks)

    def labels(self, zeroshot: bool = True, val: bool = True) -> list[str]:
        """Labels of the sets that can be measured: all but --val-data, and that."""
        return [label for label in self._tasks if (val if label == PAIRS else zeroshot)]

    def evaluate_sets(self, model: nn.Module, labels: list[str], strict: bool = False) -> dict[str, float] | None:
        """The figures of sets, by their names in `metrics.jsonl`; the same on every rank. Collective.

        None when a rank was asked to stop meanwhile. A set that can no longer be read is reported and left out, for
        its storage must not cost the training; with `strict` it raises DataError. Raises DataConfigError for labels
        or counts that do not fit.
        """
        figures: dict[str, float] = {}
        took: list[str] = []
        for label in labels:
            started = time.perf_counter()
            try:
                figures |= values_of(self.measure(model, label))
            except Stopped:
                return None
            except DataConfigError:
                raise
            except DataError as error:
                if strict:
                    raise
                log.error("%s", f"{label} is left out of this evaluation: {error}")
            took.append(f"{label} {time.perf_counter() - started:.1f} s")
        if took:
            log.info("evaluated: %s", ", ".join(took))
        return figures

    def measure(self, model: nn.Module, label: str) -> list[Figure]:
        """The figures of one set, the same on every rank. Collective. Raises DataError, or Stopped when asked to."""
        self._world.pulse.enter(f"evaluate {label}")
        try:
            with self._world.patient:
                return self._tasks[label].measure(model, self._bench)
        except DataConfigError as error:
            where = self._tasks[label].spec.where
            raise error if str(error).startswith(where) else DataConfigError(f"{where}: {error}") from error


def open_tasks(config: EvalConfig, data: DataConfig, world: World) -> dict[str, Task]:
    """All measurements of the settings by label, their first samples read. Collective."""
    return world.on_main(lambda: _open(config, data), "evaluation sets")


def _open(config: EvalConfig, data: DataConfig) -> dict[str, Task]:
    tasks = {label: open_task(spec, data) for label, spec in specs_of(config, data).items()}
    for label, task in tasks.items():
        if isinstance(task, ZeroshotTask) and not task.labelled.has_own_templates:
            log.info(
                "%s: no zeroshot_classification_templates.txt, so %d templates of our own: published figures mostly "
                "use others",
                *(label, len(task.labelled.templates)),
            )
    return tasks
