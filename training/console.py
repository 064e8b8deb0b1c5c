"""What a person sees: log lines, `train.log`, and a progress bar that the lines never break.

Knows no metrics by meaning except the few that the progress line shows, and no files of a run but its log.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.secrets import mask_text

LOG_FILE = "train.log"
ROOMS = ("training", "models", "data", "scripts")
_FILE_ONLY = "file_only"

logger = logging.getLogger(__name__)


# ---- log lines


@contextlib.contextmanager
def logging_to(run_dir: Path | None, rank: int = 0) -> Iterator[None]:
    """Inside: messages of this program go to stderr, on rank 0 also to `<run_dir>/train.log` with times.

    Other ranks show warnings only, marked with their rank. Libraries show warnings only. Secrets are masked.
    Python's warnings become log lines. Raises OSError when the file cannot be opened.
    """
    handlers: list[logging.Handler] = [_ConsoleHandler(rank)]
    if run_dir is not None and rank == 0:
        handlers.append(_file_handler(run_dir))
    root = logging.getLogger()
    for handler in handlers:
        handler.addFilter(_is_ours_or_a_warning)
        root.addHandler(handler)
    levels = {name: logging.getLogger(name).level for name in ROOMS}
    for name in ROOMS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _is_ours_or_a_warning(record: logging.LogRecord) -> bool:
    """Some libraries, W&B for one, set their own loggers to DEBUG: levels alone do not keep them quiet."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in ROOMS


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar if there is one; does not repeat lines that the bar already shows."""

    def __init__(self, rank: int):
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self.setFormatter(_Masked("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, _FILE_ONLY, False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """Says once, on the console, that it cannot be written; a full disk is no reason for a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        root = logging.getLogger()
        if self in root.handlers:
            root.removeHandler(self)
            logger.warning("%s cannot be written: %s", self.baseFilename, error.strerror)

    def close(self) -> None:
        # What is still in its buffer cannot be written either.
        with contextlib.suppress(OSError):
            super().close()


def _file_handler(run_dir: Path) -> logging.Handler:
    run_dir.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(run_dir / LOG_FILE, encoding="utf-8")
    handler.setFormatter(_Masked("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


# ---- progress


class Console:
    """Progress over the steps of a run: a bar on a terminal, lines elsewhere, nothing on other ranks.

    progress: "bar", "lines", or "auto" to take what stderr is.
    """

    def __init__(self, progress: str, total_steps: int, start_step: int = 0, is_main: bool = True):
        self._total = total_steps
        self._is_main = is_main
        self._pace = _Pace(start_step)
        self._bar: tqdm[Any] | None = None
        if is_main and (progress == "bar" or (progress == "auto" and sys.stderr.isatty())):
            self._bar = tqdm(
                total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr, smoothing=0.1
            )

    def step(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """`step` optimiser steps are done. With `values` (names of `metrics.jsonl`) a line is due."""
        if not self._is_main:
            return
        if self._bar is not None:
            if values:
                self._bar.set_postfix_str(describe(values), refresh=False)
            self._bar.update(step - self._bar.n)
        if values:
            share = step / max(1, self._total)
            left = format_duration(self._pace.seconds_left(step, self._total))
            parts = [f"step {step:,}/{self._total:,} ({share:.0%})", describe(values), f"{left} left"]
            text = ", ".join(part for part in parts if part)
            logger.info("%s", text, extra={_FILE_ONLY: self._bar is not None})

    def paused(self, step: int, seconds: float) -> None:
        """After `step` steps, something else took so long: it does not count for the pace."""
        self._pace.paused(step, seconds)
        if self._bar is not None:
            self._bar.last_print_t += seconds

    def line(self, text: str) -> None:
        """One line for the person who watches, above the bar and in `train.log`."""
        if self._is_main:
            logger.info("%s", text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Pace:
    """Seconds per step since the last lines, smoothed, so that start-up soon leaves the estimate.

    Pauses are long and rare: what they cost a step up to the last of them is expected of the steps to come.
    """

    def __init__(self, start_step: int):
        self._step, self._time = start_step, time.monotonic()
        self._start_step = start_step
        self._paused_s = self._paused_s_per_step = 0.0
        self._seconds_per_step: float | None = None

    def paused(self, step: int, seconds: float) -> None:
        self._time += seconds
        if step > self._start_step:  # what comes before the first step comes once
            self._paused_s += seconds
            self._paused_s_per_step = self._paused_s / (step - self._start_step)

    def seconds_left(self, step: int, total: int) -> float:
        now = time.monotonic()
        if step > self._step:
            recent = (now - self._time) / (step - self._step)
            old = self._seconds_per_step
            self._seconds_per_step = recent if old is None else 0.7 * old + 0.3 * recent
            self._step, self._time = step, now
        return ((self._seconds_per_step or 0.0) + self._paused_s_per_step) * max(0, total - step)


def describe(values: Mapping[str, Any]) -> str:
    """The few numbers of a step that fit on one line: loss, speed, share of time waiting for data."""
    parts = []
    if (loss := values.get("train/loss")) is not None:
        parts.append(f"loss {float(loss):.4f}")
    if (speed := values.get("train/samples_per_second")) is not None:
        parts.append(f"{float(speed):,.{0 if float(speed) >= 100 else 1}f} samples/s")
    wait, whole = values.get("train/data_time"), values.get("train/batch_time")
    if wait is not None and whole:
        parts.append(f"data wait {float(wait) / float(whole):.0%}")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
