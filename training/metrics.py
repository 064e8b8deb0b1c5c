"""The one truth about a run's numbers: `metrics.jsonl`, append-only, one object a line.

Knows no tracker from inside and no tensors: values are numbers by the time they come here. Every line
carries `step`, `epoch`, `samples_seen` and `time` (unix seconds). JSON has no NaN: a value that is not
finite is written as null and named in the line's `nonfinite` list.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

FILE_NAME = "metrics.jsonl"


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
        record = {"step": step, "epoch": epoch, "samples_seen": samples_seen, "time": time.time()} | as_json(values)
        line = memoryview((json.dumps(record, allow_nan=False) + "\n").encode())
        try:
            os.stat(self.path)
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
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
