"""Which sets and which weights a run's examples come from. What is missing is said in words; knows no HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import models
from training.cli import read_yaml
from training.config import DataConfig, TrainConfig, from_flat
from training.distributed import World
from training.errors import ConfigError, UserError
from training.evaluation.specs import PAIRS, RETRIEVAL, ZEROSHOT, SetSpec, specs_of, split_name, stem_of
from training.evaluation.standalone import load_model, newest_of
from training.origin import open_tokenizer
from training.run_report.examples import ClassExamples, Examiner, PairExamples
from training.secrets import mask_text

_FLAG = "--examples-data"


@dataclass(frozen=True)
class ExampleOptions:
    """What the caller wants to see. checkpoint: of the only run; data: a set's name in the run's settings, or pairs.

    count: examples of each kind, 0 for none; pool: first samples of a set that are looked at.
    """

    checkpoint: str | None = None
    data: str | None = None
    count: int = 8
    pool: int = 1000


@dataclass(frozen=True)
class Findings:
    """A run's examples, the checkpoint that they are of, and why others are missing."""

    checkpoint: str | None
    shown: tuple[PairExamples | ClassExamples, ...]
    missing: tuple[str, ...]


def find_examples(folder: Path, options: ExampleOptions, world: World) -> Findings:
    """The examples of one run.

    What is missing in the run is told in the findings; what the options name and is not there raises ConfigError,
    CheckpointError or DataError.
    """
    try:
        config = read_settings(folder)
        specs = choose_sets(specs_of(config.eval, config.data), options.data)
        if not specs:
            return Findings(None, (), (f"The run evaluates no pairs and no classes; {_FLAG} names a set of pairs.",))
        examiner = _open_examiner(options.checkpoint or str(folder), options, world)
    except UserError as error:
        if options.checkpoint or options.data:
            raise
        return Findings(None, (), (mask_text(str(error)),))
    name = Path(newest_of(options.checkpoint or str(folder))).name
    return _look_at(specs, examiner, config.data, name, options)


def read_settings(folder: Path) -> TrainConfig:
    """The settings of a run. Raises ConfigError for a file that this version cannot read."""
    return from_flat(read_yaml(folder / "config.yaml"))


def choose_sets(specs: Mapping[str, SetSpec], wanted: str | None) -> list[SetSpec]:
    """The first set of pairs, --val-data's before others, and the first labelled set.

    wanted: the name of a set, which is then the only one; or a URL, whose pairs take the place of the run's.
    """
    if wanted is not None and wanted in specs:
        return [_checked(specs[wanted])]
    by_kind = {spec.kind: spec for spec in reversed(list(specs.values()))}
    if PAIRS in specs:
        by_kind[RETRIEVAL] = specs[PAIRS]
    if wanted is not None:
        if "/" not in wanted and not Path(wanted).exists():
            known = ", ".join(specs) or "none"
            raise ConfigError(f"{_FLAG} {wanted}: neither a URL nor a set of the run's; it has {known}")
        name, url = split_name(wanted, _FLAG)
        by_kind[RETRIEVAL] = SetSpec(name, RETRIEVAL, url, f"{_FLAG} {wanted}", stem_of(name, RETRIEVAL))
    return [by_kind[kind] for kind in (RETRIEVAL, ZEROSHOT) if kind in by_kind]


def _checked(spec: SetSpec) -> SetSpec:
    if spec.kind not in (RETRIEVAL, ZEROSHOT):
        raise ConfigError(f"{_FLAG} {spec.label}: a set of the kind {spec.kind} has no examples to show")
    return spec


def _open_examiner(checkpoint: str, options: ExampleOptions, world: World) -> Examiner:
    model = load_model(checkpoint, None, world)
    tokenizer = open_tokenizer(model.config, models.read_provenance(newest_of(checkpoint)), world)
    transform = models.InferenceTransform(model.config.preprocess)
    return Examiner(model, tokenizer, transform, world, options.pool, options.count)


def _look_at(
    specs: list[SetSpec], examiner: Examiner, data: DataConfig, checkpoint: str, options: ExampleOptions
) -> Findings:
    shown: list[PairExamples | ClassExamples] = []
    missing: list[str] = []
    for spec in specs:
        try:
            shown.append(examiner.look(spec, data))
        except UserError as error:
            if options.data:
                raise
            missing.append(mask_text(str(error)))
    return Findings(checkpoint, tuple(shown), tuple(missing))
