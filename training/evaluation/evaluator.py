"""What a run measures and when: opens its sets at the start, evaluates the due ones, names the figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import nn

from data import EvalBatch, read_pairs
from models import InferenceTransform
from training.config import DataConfig, EvalConfig
from training.distributed import World
from training.errors import ConfigError, DataConfigError, DataError
from training.evaluation.classifier import build_classifier
from training.evaluation.classifier_cache import ClassifierCache
from training.evaluation.features import Tokenize
from training.evaluation.feed import ShouldStop, Stopped
from training.evaluation.retrieval import retrieval
from training.evaluation.sets import LabelledSet, open_imagenet, open_labelled_set
from training.evaluation.zeroshot import zeroshot

log = logging.getLogger(__name__)

PAIRS = "val"


class Evaluator:
    """The evaluation of a run.

    Construction is collective and reads the first samples of every set: raises ConfigError or DataConfigError
    for one that cannot be evaluated, saying what would be right.
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
    ):
        self._config, self._data = config, data
        self._tokenizer, self._preprocess = tokenizer, preprocess
        self._world, self._batch_size, self._workers = world, batch_size, workers
        self._should_stop, self._precision = should_stop, precision
        self._classifiers = ClassifierCache()
        self._labelled = world.on_main(lambda: _open_sets(config), "evaluation sets")
        if data.val_data:
            world.on_main(self._probe_pairs, "--val-data")

    def labels(self, zeroshot: bool = True, val: bool = True) -> list[str]:
        """Names of the sets that can be measured: those with labels or captions, and --val-data."""
        names = list(self._labelled) if zeroshot else []
        return [*names, PAIRS] if val and self._data.val_data else names

    def evaluate_sets(self, model: nn.Module, names: list[str], strict: bool = False) -> dict[str, float] | None:
        """The figures of sets by their names in `metrics.jsonl`; the same on every rank. Collective.

        None when a rank was asked to stop meanwhile. A set that can no longer be read is reported and left out, for
        its storage must not cost the training; with `strict` it raises DataError. Raises DataConfigError for labels
        or counts that do not fit.
        """
        with self._world.patient:
            return self._evaluate_sets(model, names, strict)

    def _evaluate_sets(self, model: nn.Module, names: list[str], strict: bool) -> dict[str, float] | None:
        figures: dict[str, float] = {}
        for name in names:
            self._world.pulse.enter(f"evaluate {name}")
            try:
                figures |= self._pairs(model) if name == PAIRS else self._zeroshot(model, self._labelled[name])
            except Stopped:
                return None
            except DataConfigError as error:
                raise DataConfigError(f"{name}: {error}") from error
            except DataError as error:
                if strict:
                    raise
                log.error("%s is left out of this evaluation: %s", name, error)
        return figures

    def _zeroshot(self, model: nn.Module, labelled: LabelledSet) -> dict[str, float]:
        world = self._world
        classifier = self._classifiers.get(
            model,
            (labelled.classnames, labelled.templates),
            lambda: build_classifier(
                *(model, self._tokenizer, labelled.classnames, labelled.templates, self._precision, world),
                self._should_stop,
            ),
            world,
        )
        batches = labelled.read(world.rank, world.size, self._preprocess, self._batch_size, self._workers)
        found = zeroshot(
            model,
            classifier,
            batches,
            self._batch_size,
            self._preprocess.size,
            self._precision,
            world,
            self._should_stop,
        )
        log.info(
            "%s: %.2f %% of %d images right (chance %.2f %%: one of %d classes; %d of them have images)",
            *(labelled.name, 100 * found["top1"], found["num_samples"], 100 / len(labelled.classnames)),
            *(len(labelled.classnames), found["num_classes"]),
        )
        return {f"val/{labelled.metric}-{key}": found[key] for key in ("top1", "top5", "mean_per_class_recall")}

    def _pairs(self, model: nn.Module) -> dict[str, float]:
        world = self._world
        batches = self._read_pairs(world.rank, world.size, self._preprocess, self._batch_size, self._workers)
        found = retrieval(
            model,
            *(self._tokenizer, batches, self._batch_size, self._preprocess.size, self._precision, world),
            self._should_stop,
        )
        expected = self._data.val_num_samples
        if expected is not None and found["num_samples"] != expected:
            raise DataConfigError(
                f"--val-num-samples {expected}, but --val-data has {found['num_samples']:.0f} pairs: correct it, "
                "or find out which shards are missing"
            )
        return {f"val/{key}": value for key, value in found.items()}

    def _read_pairs(
        self, rank: int, size: int, transform: Callable[[Image.Image], torch.Tensor], batch_size: int, workers: int
    ) -> Iterator[EvalBatch]:
        data = self._data
        assert data.val_data is not None
        return read_pairs(
            data.val_data,
            *(rank, size, transform),
            batch_size=batch_size,
            workers=workers,
            caption_key=data.caption_key[0],
            csv_fields=data,
        )

    def _probe_pairs(self) -> None:
        try:
            first = next(self._read_pairs(0, 1, self._preprocess, 1, 1), None)
        except DataError as error:
            raise DataConfigError(f"--val-data {self._data.val_data}: {error}") from error
        if first is None:
            raise DataConfigError(f"--val-data {self._data.val_data}: the set is empty: no pair was found in it")


def _open_sets(config: EvalConfig) -> dict[str, LabelledSet]:
    sets: dict[str, LabelledSet] = {}
    if config.imagenet_val:
        sets["imagenet"] = open_imagenet(config.imagenet_val)
    for spec in config.zeroshot_data:
        labelled = open_labelled_set(spec)
        if labelled.name in (*sets, PAIRS):
            raise ConfigError(f"--zeroshot-data {spec}: the name {labelled.name!r} is taken; write another name=folder")
        sets[labelled.name] = labelled
    return sets
