"""The truth about a run's numbers: `metrics.jsonl` of the trainer, and `evaluations.jsonl` of who evaluates beside it.

Both are append-only, one object a line, and each has one writer. Knows no tracker from inside and no tensors: values
are numbers by the time they come here. Every line carries `step`, `epoch`, `samples_seen` and `time` (unix seconds).
JSON has no NaN: a value that is not finite is written as null and named in the line's `nonfinite` list.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

FILE_NAME = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


class Listener(Protocol):
    """Whoever wants a copy of every record; must neither raise nor block."""

    def write(self, record: Mapping[str, Any]) -> None: ...


class MetricsLog:
    """Writes the file of one run, on the main rank.

    resume_step: the step of the checkpoint that the run continues from; lines beyond it belong to a
    future that was lost, and are cut off before the first write. None starts the file anew.
    Raises OSError naming the file when it cannot be written, or is no longer there: then the run's folder was removed
    or unmounted, and what is written by name would go elsewhere.
    """

    def __init__(self, run_dir: Path, resume_step: int | None, listener: Listener | None = None):
        self.path = run_dir / FILE_NAME
        self._listener = listener
        run_dir.mkdir(parents=True, exist_ok=True)
        _keep_until(self.path, -1 if resume_step is None else resume_step)
        self._file = self._open()

    def _open(self) -> io.FileIO:
        # Unbuffered: a line is in the file when `write` returns, and a failed one leaves nothing to fail again later.
        return self.path.open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Cut off the lines beyond `step`: the run goes on from there."""
        self._file.close()
        _keep_until(self.path, step)
        self._file = self._open()

    def write(self, values: Mapping[str, Any], *, step: int, epoch: int, samples_seen: int) -> dict[str, Any]:
        """Append one line, hand the record to the listener, and return it. Scalars of any library are taken."""
        record = make_record(values, step=step, epoch=epoch, samples_seen=samples_seen)
        append_record(self._file, self.path, record)
        if self._listener is not None:
            self._listener.write(record)
        return record

    def sync(self) -> None:
        """Make the lines so far outlive the machine. From any thread; OSError where the disk does not take them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def make_record(values: Mapping[str, Any], *, step: int, epoch: int, samples_seen: int) -> dict[str, Any]:
    """What a line holds, of now."""
    return {"step": step, "epoch": epoch, "samples_seen": samples_seen, "time": time.time()} | as_json(values)


def append_record(file: io.FileIO, path: Path, record: Mapping[str, Any]) -> None:
    """One more line in `file`, which `path` must still name. Raises OSError that names it."""
    line = memoryview((json.dumps(record, allow_nan=False) + "\n").encode())
    try:
        os.stat(path)
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain numbers, strings, booleans and containers of them; what is not finite becomes null and is listed."""
    plain = {name: _plain(value) for name, value in values.items()}
    nonfinite = [name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    plain |= dict.fromkeys(nonfinite)
    return plain | ({"nonfinite": nonfinite} if nonfinite else {})


def _plain(value: Any) -> Any:
    """A 0-d array or tensor of any library as a Python number."""
    return value.item() if hasattr(value, "item") else value


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; lines that a kill tore are passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """All that is known of a run, by step: the trainer's records, and behind those of a step its evaluations beside it.

    A figure that the trainer has measured itself counts as it did; of several evaluations, that of the checkpoint
    saved last. Figures of checkpoints that the trainer has gone back behind since are left out.
    """
    own = sorted(_read_if_there(run_dir / FILE_NAME), key=_step_of)
    beside = _in_force(own, _read_if_there(run_dir / EVALUATIONS_FILE))
    return sorted(own + beside, key=_step_of)


def _read_if_there(path: Path) -> list[dict[str, Any]]:
    return list(read_metrics(path)) if path.is_file() else []


def _step_of(record: Mapping[str, Any]) -> int:
    return int(record["step"])


def figures_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, of all that a record holds."""
    return {name: value for name, value in record.items() if name.startswith("val/")}


def _in_force(own: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations without figures that do not count; `own` by step."""
    steps = [record["step"] for record in own]
    latest = list(accumulate((record.get("time", 0.0) for record in own), max))
    chosen: dict[tuple[int, str], int] = {(record["step"], name): -1 for record in own for name in figures_of(record)}
    for index, record in enumerate(evaluations):
        num_earlier = bisect_left(steps, record["step"])
        # A trainer that writes of an earlier step than one it has saved has gone back, and makes that step anew.
        if num_earlier and latest[num_earlier - 1] > _saved_at(record):
            continue
        for name in figures_of(record):
            best = chosen.get((record["step"], name))
            if best is None or (best >= 0 and _saved_at(record) >= _saved_at(evaluations[best])):
                chosen[record["step"], name] = index
    counting = []
    for index, record in enumerate(evaluations):
        dropped = {name for name in figures_of(record) if chosen.get((record["step"], name)) != index}
        kept = {name: value for name, value in record.items() if name not in dropped}
        counting += [kept] if figures_of(kept) else []
    return counting


def _saved_at(record: Mapping[str, Any]) -> float:
    """When the evaluated checkpoint was saved."""
    return float(record.get("saved_at", math.inf))


def _keep_until(path: Path, last_step: int) -> None:
    """Replace the file, in one rename, by its records of steps up to `last_step`."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for record in read_metrics(path):
            if record["step"] <= last_step:
                file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
