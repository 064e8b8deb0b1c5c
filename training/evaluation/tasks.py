"""The kinds of measurements, one class each: how a set is opened, and what is measured on it.

A new kind of evaluation is a class here, its name and figures in `specs`, and its arithmetic in a file of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from data import EvalBatch
from models import InferenceTransform
from training.config import DataConfig
from training.distributed import World
from training.evaluation.classifier import build_classifier
from training.evaluation.classifier_cache import ClassifierCache
from training.evaluation.features import Tokenize
from training.evaluation.feed import ShouldStop
from training.evaluation.figures import Figure, mean_of, share
from training.evaluation.linear_probe import linear_probe
from training.evaluation.retrieval import retrieval
from training.evaluation.sets import LabelledSet, PairSet, open_labelled_set, open_pairs
from training.evaluation.specs import LINEAR_PROBE, RETRIEVAL, ZEROSHOT, SetSpec
from training.evaluation.zeroshot import zeroshot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """What every measurement is made with, and on which ranks."""

    tokenizer: Tokenize
    preprocess: InferenceTransform
    world: World
    batch_size: int = 64
    workers: int = 4
    should_stop: ShouldStop | None = None
    precision: str = "fp32"
    classifiers: ClassifierCache = field(default_factory=ClassifierCache)

    def batches(self, opened: LabelledSet | PairSet) -> Iterator[EvalBatch]:
        """This rank's batches of a set."""
        return opened.read(self.world.rank, self.world.size, self.preprocess, self.batch_size, self.workers)


class Task(Protocol):
    """One set and how it is measured. Travels between ranks: it holds no open files."""

    @property
    def spec(self) -> SetSpec: ...

    @property
    def prompts_sha256(self) -> str:
        """A fingerprint of what the set is asked with, which may change under its name; "" where that is nothing."""

    def measure(self, model: nn.Module, bench: Bench) -> list[Figure]:
        """The figures, the same on every rank. Collective. Raises DataError, DataConfigError or Stopped."""


@dataclass(frozen=True)
class ZeroshotTask:
    """Zero-shot classification."""

    labelled: LabelledSet

    @property
    def spec(self) -> SetSpec:
        return self.labelled.spec

    @property
    def prompts_sha256(self) -> str:
        return self.labelled.prompts_sha256

    def measure(self, model: nn.Module, bench: Bench) -> list[Figure]:
        labelled = self.labelled
        classifier = bench.classifiers.get(
            model, (labelled.classnames, labelled.templates), lambda: self._build(model, bench), bench.world
        )
        found = zeroshot(
            model,
            classifier,
            bench.batches(labelled),
            bench.batch_size,
            bench.preprocess.size,
            bench.precision,
            bench.world,
            bench.should_stop,
        )
        self.spec.manifest.check(self.spec.where, num_samples=found["num_samples"])
        _tell(self.spec, found, len(labelled.classnames))
        return _classified(self.spec, found)

    def _build(self, model: nn.Module, bench: Bench) -> Tensor:
        return build_classifier(
            model,
            bench.tokenizer,
            self.labelled.classnames,
            self.labelled.templates,
            bench.precision,
            bench.world,
            bench.should_stop,
        )


@dataclass(frozen=True)
class ProbeTask:
    """A linear classifier on the image features, fitted on the set's training split."""

    labelled: LabelledSet

    @property
    def spec(self) -> SetSpec:
        return self.labelled.spec

    @property
    def prompts_sha256(self) -> str:
        return ""

    def measure(self, model: nn.Module, bench: Bench) -> list[Figure]:
        num_classes = len(self.labelled.classnames)
        found = linear_probe(
            model,
            bench.batches(self.labelled.of_split("train")),
            bench.batches(self.labelled),
            num_classes,
            bench.batch_size,
            bench.preprocess.size,
            bench.precision,
            bench.world,
            bench.should_stop,
        )
        self.spec.manifest.check(self.spec.where, num_samples=found["num_samples"])
        _tell(self.spec, found, num_classes)
        return [*_classified(self.spec, found), Figure(f"val/{self.spec.stem}strength", found["strength"])]


@dataclass(frozen=True)
class RetrievalTask:
    """Retrieval between pictures and captions, and the loss on them."""

    pairs: PairSet

    @property
    def spec(self) -> SetSpec:
        return self.pairs.spec

    @property
    def prompts_sha256(self) -> str:
        return ""

    def measure(self, model: nn.Module, bench: Bench) -> list[Figure]:
        spec = self.spec
        found = retrieval(
            model,
            bench.tokenizer,
            bench.batches(self.pairs),
            bench.batch_size,
            bench.preprocess.size,
            bench.precision,
            bench.world,
            bench.should_stop,
        )
        sizes = {name: found[name] for name in ("num_samples", "num_captions")}
        spec.manifest.check(spec.where, **sizes)
        named = {f"val/{spec.stem}{name}": value for name, value in found.items()}
        return [
            share(name, value, found["num_samples"]) if "_R@" in name else Figure(name, value)
            for name, value in named.items()
        ]


def open_task(spec: SetSpec, data: DataConfig) -> Task:
    """The measurement that `spec` asks for, its set's first samples read. Raises ConfigError or DataConfigError."""
    if spec.kind == RETRIEVAL:
        return RetrievalTask(open_pairs(spec, data))
    if spec.kind == LINEAR_PROBE:
        return ProbeTask(open_labelled_set(spec, splits=("train", "test")))
    assert spec.kind == ZEROSHOT, spec.kind
    return ZeroshotTask(open_labelled_set(spec))


def _classified(spec: SetSpec, found: Mapping[str, float]) -> list[Figure]:
    stem, num_samples = f"val/{spec.stem}", found["num_samples"]
    return [
        *(share(stem + name, found[name], num_samples) for name in ("top1", "top5")),
        mean_of(f"{stem}mean_per_class_recall", found["mean_per_class_recall"], found["recall_standard_error"]),
        Figure(f"{stem}num_samples", num_samples),
    ]


def _tell(spec: SetSpec, found: Mapping[str, float], num_classes: int) -> None:
    log.info(
        "%s: %.2f %% of %d images right (chance %.2f %%: one of %d classes; %d of them have images)",
        *(spec.label, 100 * found["top1"], found["num_samples"], 100 / num_classes, num_classes, found["num_classes"]),
    )


__all__ = ["Bench", "ProbeTask", "RetrievalTask", "Task", "ZeroshotTask", "open_task"]
