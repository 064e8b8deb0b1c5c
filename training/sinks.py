"""Trackers (W&B, TensorBoard) as sinks of the metrics, each behind a bounded queue and a thread of its own.

A sink that raises, blocks or falls behind is dropped with one warning; the run goes on. Knows nothing of
the loop; the truth is in `training.metrics`. W&B has a process besides, see `training.tracker_process`.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
import os
import queue
import secrets
import string
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from training.errors import ConfigError
from training.secrets import mask_secrets, mask_text

logger = logging.getLogger(__name__)

SINKS = ("wandb", "tensorboard")
QUEUE_LENGTH = 1000
NOT_PLOTTED = ("step", "epoch", "samples_seen", "time", "nonfinite")


class Sink(Protocol):
    """One tracker. Lives entirely in its thread, so it may be slow and may raise."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None:
        """Give up what is under way, at once; called when the sink is dropped, from another thread too."""


@dataclass(frozen=True)
class SinkSettings:
    """What trackers show of a run. `resume_step` None is a new run.

    writer: who writes, where that is not the trainer, who may be writing at the same time.
    """

    run_dir: Path
    run_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    resume_step: int | None = None
    wandb_run_id: str = ""
    wandb_project: str = "clipyard"
    wandb_notes: str = ""
    writer: str = ""


def parse_report_to(text: str) -> tuple[str, ...]:
    """The sinks that `--report-to` names: "", "all", or names with commas between. Raises ConfigError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return SINKS
    for name in names:
        if name not in SINKS:
            near = difflib.get_close_matches(name, (*SINKS, "all"), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--report-to: unknown tracker {name!r}{hint} (known: {', '.join(SINKS)}, all)")
    return tuple(dict.fromkeys(names))


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError where the package of a sink is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report-to {name}: the package {name} is not installed (pip install {name})")


def new_wandb_id() -> str:
    """A fresh run id; made here, not by W&B, so that the first checkpoint can hold it without waiting."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def build_trackers(names: Sequence[str], settings: SinkSettings) -> Trackers:
    """Start the named sinks. Raises ConfigError at once when a package is missing; later troubles only warn."""
    check_installed(names)
    from training.tracker_process import WandbProcess

    kinds: dict[str, Callable[[SinkSettings], Sink]] = {"wandb": WandbProcess, "tensorboard": TensorBoardSink}
    return Trackers([SinkThread(name, partial(kinds[name], settings)) for name in names])


class Trackers:
    """All sinks of a run; with none it does nothing. Never raises, never blocks longer than `close` says."""

    def __init__(self, sinks: Sequence[SinkThread] = ()):
        self._sinks = list(sinks)

    def write(self, record: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self, timeout_s: float = 10.0) -> None:
        """Let the sinks finish what is queued, all of them together for at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for sink in self._sinks:
            sink.ask_to_close()
        for sink in self._sinks:
            sink.join(max(0.0, deadline - time.monotonic()))


class SinkThread:
    """Runs one sink in a daemon thread, fed through a bounded queue.

    `build` is called in the thread, since connecting to a tracker may hang too.
    """

    def __init__(self, name: str, build: Callable[[], Sink], queue_length: int = QUEUE_LENGTH):
        self.name = name
        self._build = build
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(queue_length)
        self._sink: Sink | None = None
        self._dropped = threading.Event()
        self._warning = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> bool:
        """Whether the sink was given up."""
        return self._dropped.is_set()

    def write(self, record: Mapping[str, Any] | None) -> None:
        """Queue a record; None ends the thread. A full queue drops the sink."""
        if self.dropped:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._drop(f"it did not take {self._queue.maxsize} records")

    def ask_to_close(self) -> None:
        self.write(None)

    def join(self, timeout_s: float) -> None:
        if self.dropped:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._drop("it did not finish in time at the end")

    def _run(self) -> None:
        try:
            self._sink = sink = self._build()
            while not self.dropped and (record := self._queue.get()) is not None:
                sink.write(record)
            sink.close()
        # Anything at all may come out of a tracker, SystemExit included; none of it is the run's concern.
        except BaseException as error:
            self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, reason: str) -> None:
        with self._warning:
            if self.dropped:
                return
            self._dropped.set()
        if self._sink is not None:
            self._sink.abandon()
        first_line = mask_text(reason).splitlines()[0]
        logger.warning("tracker %s dropped, the run goes on without it: %s", self.name, first_line)


class TensorBoardSink:
    """Event files under `<run>/tensorboard`. On a resume, points beyond the checkpoint's step are purged.

    A second writer has a folder of its own in there: of one folder TensorBoard reads a file to its end and, when it
    has gone on to a newer one, never returns. It shows both folders' curves of one name in one chart.
    """

    def __init__(self, settings: SinkSettings):
        with warnings.catch_warnings():
            # TensorBoard's generated code warns about its own dependencies; nobody here can act on it.
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter

        _leave_errors_to_the_next_call()
        purge_step = None if settings.resume_step is None else settings.resume_step + 1
        self._writer = SummaryWriter(str(settings.run_dir / "tensorboard" / settings.writer), purge_step=purge_step)
        if settings.resume_step is None and settings.config:
            self._writer.add_text("config", _as_markdown(mask_secrets(dict(settings.config))), 0)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in plottable(record).items():
            self._writer.add_scalar(name, value, record["step"], record["time"])
        # Its own writer thread keeps an error to itself until the next call: a full disk must show here.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """Nothing to end: its own thread is a daemon."""


def _leave_errors_to_the_next_call() -> None:
    """TensorBoard's writing thread hands its error to the next call, where it is told; it prints it besides."""
    earlier = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            earlier(args)

    threading.excepthook = hook


class WandbSink:
    """A W&B run whose id comes from the checkpoint; WANDB_MODE=offline works without a network.

    Points are not sent under W&B's own step counter, which drops whatever does not increase after a
    resume: `step` is an ordinary value and declared as the x-axis.
    """

    def __init__(self, settings: SinkSettings):
        import wandb

        folder = settings.run_dir / settings.writer
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=settings.wandb_project,
            name=settings.run_name,
            id=settings.wandb_run_id or None,
            resume="allow",
            notes=mask_text(settings.wandb_notes) or None,
            config=mask_secrets(dict(settings.config)),
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off", **_beside_the_trainer(settings.writer)),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        position = {name: record[name] for name in ("step", "epoch", "samples_seen")}
        self._run.log(position | plottable(record))

    def close(self) -> None:
        self._run.finish()

    def abandon(self) -> None:
        """Nothing to end here: the process around it is killed."""


def _beside_the_trainer(writer: str) -> dict[str, Any]:
    """W&B's settings for a second writer of a run: it adds points, and leaves files and the run's end to the first.

    W&B's server counts the points of all writers only in its shared mode; without a network each has files of its own.
    """
    if not writer:
        return {}
    alone = os.environ.get("WANDB_MODE", "online") not in ("online", "shared")
    mode = {} if alone else {"mode": "shared"}
    return mode | {"x_primary": False, "x_label": writer, "x_update_finish_state": False}


def plottable(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record; what was not finite comes back as NaN, so that a curve shows the gap."""
    values = {name: value for name, value in record.items() if name not in NOT_PLOTTED}
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    return numbers | dict.fromkeys(record.get("nonfinite", ()), math.nan)


def _as_markdown(config: Mapping[str, Any]) -> str:
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in config.items())])
