"""W&B in a process of its own, fed through a pipe: hanging, crashing or waiting at the exit, it does so alone.

Knows how a sink is moved out, not what it does. The process ignores the signals by which a cluster ends a run, and
ends when the pipe does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.preemption import SIGNALS
from training.sinks import SinkSettings, WandbSink

LOG_FILE = "tracker.log"
_ORPHAN_S = 30  # what a tracker may take to finish when the run was killed
_END = "null"


class WandbProcess:
    """A sink whose `WandbSink` lives in a child process. What that prints goes to `tracker.log`, beside W&B's files."""

    def __init__(self, settings: SinkSettings):
        folder = settings.run_dir / settings.writer / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG_FILE
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training.tracker_process"],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._send(json.dumps(dataclasses.asdict(settings), default=str))

    def write(self, record: Mapping[str, Any]) -> None:
        """Raises RuntimeError with the last thing that the tracker said when its process has ended."""
        self._send(json.dumps(record))

    def close(self) -> None:
        """Wait until the tracker has finished, however long that takes."""
        self._send(_END)
        with contextlib.suppress(OSError):
            self._stdin.close()
        if self._process.wait() != 0:
            raise RuntimeError(self._last_words())

    def abandon(self) -> None:
        """End the tracker at once; from any thread."""
        self._process.kill()

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def _send(self, line: str) -> None:
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except OSError as error:
            self._process.wait()
            with contextlib.suppress(OSError):  # of what is still in its buffer
                self._stdin.close()
            raise RuntimeError(self._last_words()) from error

    def _last_words(self) -> str:
        said = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        return f"its process ended with {self._process.returncode}: {last}"


def _environment() -> dict[str, str]:
    """The parent's, with the packages that it runs from importable."""
    root = str(Path(__file__).resolve().parents[1])
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def main() -> None:
    """Settings in the first line of the standard input, a record in each other one, `null` at a regular end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    lines = iter(sys.stdin)
    values = json.loads(next(lines))
    sink = WandbSink(SinkSettings(**values | {"run_dir": Path(values["run_dir"])}))
    for line in lines:
        if line.strip() == _END or not line.endswith("\n"):
            break
        sink.write(json.loads(line))
    signal.alarm(0 if line.strip() == _END else _ORPHAN_S)
    sink.close()


if __name__ == "__main__":
    main()
