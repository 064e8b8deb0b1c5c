"""What a run measures and when: opens its sets at the start, evaluates the due ones, names the figures."""

from __future__ import annotations

import logging

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
        self._config, self._world = config, world
        self._bench = Bench(tokenizer, preprocess, world, batch_size, workers, should_stop, precision)
        self._tasks = open_tasks(config, data, world) if tasks is None else tasks

    @property
    def tasks(self) -> dict[str, Task]:
        """What can be measured, by the labels of the sets."""
        return dict(self._tasks)

    def due(self, epoch: int, is_last: bool) -> list[str]:
        """Labels of the sets to be evaluated after `epoch` epochs."""
        zeroshot_is_due = _is_due(self._config.zeroshot_frequency, epoch, is_last)
        pairs_are_due = _is_due(self._config.val_frequency, epoch, is_last)
        return [label for label in self._tasks if (pairs_are_due if label == PAIRS else zeroshot_is_due)]

    def evaluate(self, model: nn.Module, *, epoch: int, is_last: bool) -> dict[str, float] | None:
        """The figures of the due sets, by their names in `metrics.jsonl`; the same on every rank. Collective.

        None when a rank was asked to stop meanwhile. A set that can no longer be read is reported and left out:
        its storage must not cost the training. Raises DataConfigError for labels or counts that do not fit.
        """
        return self.evaluate_sets(model, self.due(epoch, is_last))

    def evaluate_sets(self, model: nn.Module, labels: list[str], strict: bool = False) -> dict[str, float] | None:
        """As `evaluate`, for sets by label; with `strict`, a set that cannot be read raises DataError."""
        figures: dict[str, float] = {}
        for label in labels:
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


def _is_due(frequency: int, epoch: int, is_last: bool) -> bool:
    return frequency > 0 and (is_last or epoch % frequency == 0)


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
