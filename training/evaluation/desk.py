"""What a watching evaluation is told, and what its rank 0 alone reads and writes: lookout, ledger, trackers.

Knows no model and no set; its methods are called on rank 0 only and are no meeting of ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from training.checkpoint_content import STATE_FILE
from training.distributed import World
from training.errors import ConfigError, RemoteError
from training.evaluation.claim import Claim
from training.evaluation.feed import ShouldStop
from training.evaluation.ledger import Ledger, Measurement
from training.evaluation.lookout import Arrival, Choice, Lookout, View
from training.evaluation.watched import WatchedRun
from training.metrics import FILE_NAME as METRICS_FILE
from training.metrics import figures_of
from training.remote import CHECKPOINTS
from training.secrets import mask_text
from training.sinks import (
    NOT_PLOTTED,
    SinkSettings,
    Trackers,
    build_trackers,
    check_installed,
    new_wandb_id,
    parse_report_to,
)

log = logging.getLogger(__name__)

WRITER = "evaluations"
# What a line tells of an evaluation; the file has all of it.
_TOLD = ("-top1", "R@1", "clip_val_loss", "mean_per_class_recall")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Whose checkpoints are evaluated, which of them, and where the figures go.

    run: folder or URL. output: where the figures go; the run's folder if None. scratch: where a checkpoint of a URL
    lies while it is evaluated. averaged: the moving average of the weights too. tokenizer: where its files are,
    instead of where they were in training.
    """

    run: str
    output: Path | None = None
    choice: Choice = Choice()
    interval_s: float = 60.0
    averaged: bool = False
    tokenizer: str | None = None
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    report_to: str = ""
    wandb_project: str = "clipyard"

    def check(self) -> None:
        """Raises ConfigError for what cannot work."""
        check_installed(parse_report_to(self.report_to))
        if "://" in self.run and self.output is None:
            raise ConfigError(f"RUN {mask_text(self.run)} is a URL: --output must name a local folder for the figures")
        if self.output is not None and (self.output / CHECKPOINTS).exists():
            raise ConfigError(f"--output {self.output} is the folder of a run: leave it out if it is RUN's own")
        for flag, value in (("--interval-s", self.interval_s), ("--every", self.choice.every)):
            if value <= 0:
                raise ConfigError(f"{flag} must be positive, got {value:g}")

    def is_there(self, run: WatchedRun) -> bool:
        """Whether the run is. Raises ConfigError where nobody is going to wait for it."""
        if run.exists():
            return True
        if self.choice.once:
            raise ConfigError(f"RUN {self.run}: there is no such folder; RUN is <logs>/<name> of a run, or its URL")
        return False


class Verdict(IntEnum):
    """What became of a checkpoint that could not be evaluated, of the errors of several ranks the highest.

    UNSEEN: another try may succeed. GONE: rotated away, or made anew. DAMAGED: not what its manifest says.
    REFUSED: nothing is wrong with it; the command or its environment does not fit.
    """

    UNSEEN = 0
    DAMAGED = 1
    REFUSED = 2
    GONE = 3


class Desk:
    """The files and facts of rank 0."""

    def __init__(self, run: WatchedRun, lookout: Lookout, ledger: Ledger, reports: Reports, output: Path | None):
        self._run, self.lookout, self._ledger = run, lookout, ledger
        self._reports, self._output = reports, output

    def look(self) -> View:
        """What is to be evaluated. Brings the trainer's numbers along where the figures go elsewhere."""
        view = self.lookout.look()
        if self._output is not None and (view.arrivals or view.end):
            with contextlib.suppress(RemoteError):
                _copy_metrics(self._run, self._output)
        return view

    def loaded(self, arrival: Arrival) -> None:
        """A checkpoint is at hand: the first one tells which run of the trackers' it belongs to."""
        self._reports.open(self._run.path_of(arrival.name) / STATE_FILE)

    def note(self, arrival: Arrival, measurement: Measurement, figures: Mapping[str, float]) -> None:
        """Write the figures down; none is a set that could not be read, which has been told."""
        if not figures:
            self.lookout.failed(arrival, measurement)
            return
        self._ledger.write(arrival.name, arrival.manifest, measurement, figures)
        self.lookout.done(arrival, measurement)
        shown = {name: value for name, value in measurement.named(figures).items() if name.endswith(_TOLD)}
        log.info("%s: %s", arrival, ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))

    def judge(self, arrival: Arrival, severity: Verdict, error: str) -> Verdict:
        """What follows from an error in reading a checkpoint; tells it in one line."""
        try:
            is_there = self._run.manifest_text(arrival.name) == arrival.text
        except RemoteError as failure:
            is_there, severity, error = True, Verdict.UNSEEN, str(failure)
        if not is_there:
            log.info("%s is no longer there: rotated away, or made anew, before it was evaluated", arrival)
            return Verdict.GONE
        if severity is Verdict.UNSEEN:
            log.warning("%s cannot be read now: %s; trying again", arrival, error)
            self.lookout.failed(arrival)
        if severity is Verdict.DAMAGED:
            log.error("%s is passed over: %s", arrival, error)
            self.lookout.damaged(arrival)
        return severity


class Reports:
    """The trackers, opened when a checkpoint can tell which run of theirs it belongs to."""

    def __init__(self, config: WatchConfig, run_name: str, folder: Path):
        self._config, self._run_name, self._folder = config, run_name, folder
        self._trackers: Trackers | None = None

    def open(self, state: Path) -> None:
        """state: a checkpoint's state.json; where it has gone, the next one's. The first call that reads one counts."""
        if self._trackers is not None:
            return
        try:
            run_id = json.loads(state.read_text(encoding="utf-8")).get("wandb_run_id")
        except (OSError, ValueError):
            return
        settings = SinkSettings(
            run_dir=self._folder,
            run_name=self._run_name,
            wandb_run_id=run_id or new_wandb_id(),
            wandb_project=self._config.wandb_project,
            writer=WRITER,
        )
        self._trackers = build_trackers(parse_report_to(self._config.report_to), settings)

    def write(self, record: Mapping[str, Any]) -> None:
        """What is about the checkpoint's file is no curve."""
        if self._trackers is not None:
            position = {name: record[name] for name in NOT_PLOTTED if name in record}
            self._trackers.write(position | figures_of(record))

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()


@contextmanager
def open_desk(
    config: WatchConfig, run: WatchedRun, wanted: Sequence[Measurement], world: World, should_stop: ShouldStop
) -> Iterator[Desk | None]:
    """The desk on rank 0, closed on every path, and None elsewhere. Collective.

    Raises ConfigError when another process evaluates this run, or the figures cannot be written.
    """
    folder = config.output or Path(config.run)
    desks: list[Desk] = []
    with ExitStack() as stack:

        def open_files() -> None:
            reports = stack.enter_context(closing(Reports(config, run.name, folder)))
            claim = stack.enter_context(Claim(folder))
            ledger = stack.enter_context(closing(Ledger(folder, claim, reports)))
            desks.append(Desk(run, Lookout(run, ledger, wanted, config.choice), ledger, reports, config.output))

        # At length: whoever had the right before may have to be watched for a while.
        world.on_main_at_length(open_files, "RUN", should_stop)
        yield desks[0] if desks else None


def _copy_metrics(run: WatchedRun, output: Path) -> None:
    """The curves of training belong beside those of evaluation."""
    content = run.read(METRICS_FILE)
    path = output / METRICS_FILE
    if content is None or (path.exists() and path.read_bytes() == content):
        return
    temporary = path.with_name(f"{METRICS_FILE}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
