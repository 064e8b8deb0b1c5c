"""Many models on many sets. What is measured is kept at once, so that an interrupted matrix goes on. Prints nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from training.checkpoint_content import EMA_FILE, MODEL_FILE, verify_weights
from training.distributed import World
from training.errors import ConfigError, DataConfigError, DataError, FolderError
from training.evaluation.evaluator import Evaluator, open_tasks
from training.evaluation.exam import Exam
from training.evaluation.figures import Figure
from training.evaluation.ledger import cut_torn_line
from training.evaluation.standalone import find_model, open_candidate
from training.evaluation.tasks import Task
from training.secrets import mask_text

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class Candidate:
    """A model to be measured. model, tokenizer: for weights that do not know their own."""

    name: str
    checkpoint: str
    model: str | None = None
    averaged: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True)
class Cell:
    """One model on one set: its figures, or why there are none."""

    candidate: str
    label: str
    figures: tuple[Figure, ...] = ()
    error: str | None = None


class Results:
    """The file of what was measured: an object a line, appended as soon as it is known. On rank 0 only.

    A line is found again by what decides its figures: the weights' content, the set and its prompts, the precision.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._known: dict[str, tuple[Figure, ...]] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(path)
            with path.open("a+", encoding="utf-8") as file:  # now: not after the first measurement
                file.seek(0)
                text = file.read()
        except OSError as error:
            raise ConfigError(f"--results {path}: {error.strerror or error}") from error
        for line in text.splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
            self._known[record["key"]] = tuple(Figure(**figure) for figure in record["figures"])
        except (ValueError, KeyError, TypeError):
            log.warning("--results %s: a line that is none of ours is passed over: %.60s", self._path, line)

    def find(self, key: str) -> tuple[Figure, ...] | None:
        """What was measured under `key`, if anything."""
        return self._known.get(key)

    def add(self, key: str, cell: Cell, about: dict[str, Any]) -> None:
        """Keep a cell, so that it outlives the machine. Raises FolderError when it cannot be written."""
        self._known[key] = cell.figures
        if self._path is None:
            return
        record = {"key": key, "model": cell.candidate, "set": cell.label, **about}
        record["figures"] = [asdict(figure) for figure in cell.figures]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FolderError(f"--results {self._path}: {error.strerror or error}") from error


def measure_matrix(
    candidates: Sequence[Candidate], exam: Exam, world: World, results_file: Path | None = None
) -> list[Cell]:
    """Every candidate on every set, the same on every rank. Collective.

    A set that cannot be read to its end gives a cell with the reason, and the others are measured all the same.
    Raises ConfigError, DataConfigError or CheckpointError for what is wrong from the start.
    """
    exam.check()
    world.on_main(lambda: _check(candidates), "--checkpoint")
    tasks = open_tasks(exam.sets, exam.data, world)
    results = world.on_main(lambda: Results(results_file), "--results")
    return [cell for candidate in candidates for cell in _row(candidate, tasks, exam, world, results)]


def _check(candidates: Sequence[Candidate]) -> None:
    """Before any set is read: a damaged file must not be found after hours with the others."""
    for candidate in candidates:
        verify_weights(_find(candidate))


def _row(candidate: Candidate, tasks: dict[str, Task], exam: Exam, world: World, results: Results) -> Iterator[Cell]:
    """One model's cells, in the order of the sets; it is loaded only if one of them is not known yet. Collective."""
    weights = world.on_main(lambda: _fingerprint(candidate), f"--checkpoint {candidate.checkpoint}")
    keys = {label: _key(weights, candidate, task, exam) for label, task in tasks.items()}
    known = world.broadcast_object({label: results.find(key) for label, key in keys.items()})
    about = {"checkpoint": mask_text(candidate.checkpoint), "weights": weights, "precision": exam.precision}
    missing = {label: task for label, task in tasks.items() if known[label] is None}
    measured = _measure(candidate, missing, exam, world)
    for label in tasks:
        if (figures := known[label]) is not None:
            yield Cell(candidate.name, label, figures)
            continue
        cell = next(measured)
        if cell.error is None:
            world.on_main(partial(results.add, keys[label], cell, about), "--results")
        yield cell


def _measure(candidate: Candidate, tasks: dict[str, Task], exam: Exam, world: World) -> Iterator[Cell]:
    """The cells of one model, one after the other. Collective; a model without sets to measure is not even loaded."""
    if not tasks:
        return
    clip, evaluator = open_candidate(
        candidate.checkpoint, candidate.model, exam, world, candidate.averaged, candidate.tokenizer, tasks=tasks
    )
    for label in tasks:
        log.info("%s on %s", candidate.name, label)
        yield _cell(candidate.name, label, evaluator, clip)


def _cell(name: str, label: str, evaluator: Evaluator, clip: nn.Module) -> Cell:
    try:
        return Cell(name, label, tuple(evaluator.measure(clip, label)))
    except (DataError, DataConfigError) as error:
        return Cell(name, label, error=mask_text(str(error)))


def _find(candidate: Candidate) -> str:
    return _model_and_weights(candidate)[1]


def _model_and_weights(candidate: Candidate) -> tuple[str, str]:
    return find_model(candidate.checkpoint, candidate.model, candidate.averaged)


def _fingerprint(candidate: Candidate) -> str:
    """Of the content of the weights and of the model's configuration, whatever they are called."""
    model, weights = _model_and_weights(candidate)
    path, digest = Path(weights), hashlib.sha256()
    digest.update(Path(model).read_bytes() if Path(model).is_file() else model.encode())
    if path.is_dir():
        own = path / (EMA_FILE if candidate.averaged else MODEL_FILE)
        path = own if own.is_file() else path
    files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHTS) if path.is_dir() else [path]
    for file in filter(Path.is_file, files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if not any(map(Path.is_file, files)):  # elsewhere than on this machine: its address must do
        digest.update(weights.encode())
    return digest.hexdigest()[:16]


def _key(weights: str, candidate: Candidate, task: Task, exam: Exam) -> str:
    """Everything that decides the figures of a cell; names, and how many ranks and workers measure, do not."""
    spec = replace(task.spec, where="", suite=None)
    parts: tuple[Any, ...] = (
        weights,
        candidate.tokenizer,
        asdict(spec),
        task.prompts_sha256,
        exam.precision,
    )
    if task.spec.kind == "retrieval":
        parts += (exam.data.caption_key, exam.data.csv_separator, exam.data.csv_img_key, exam.data.csv_caption_key)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
