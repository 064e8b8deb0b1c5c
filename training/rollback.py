"""Back to an earlier checkpoint and on with later samples, when too many updates in a row were left out.

Weights, optimiser and step go back; the data position does not: what lies between is passed over. The state that
this gives replaces the checkpoint at once, so that a resume goes on in the same way.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint_content import LoadedCheckpoint, load_checkpoint
from training.checkpoint_files import list_checkpoints, verify_checkpoint
from training.distributed import World
from training.errors import CheckpointError, NonFiniteError
from training.feed import Feed
from training.guard import RollbackDue
from training.learner import Learner, restore
from training.nodes import on_every_node
from training.plan import Plan
from training.report import Reporter
from training.rotation import discard
from training.saving import Saver
from training.setup import start_progress
from training.uploader import Uploader

log = logging.getLogger(__name__)


@dataclass
class Rollback:
    """Called by all ranks together; returns the step to go on from.

    start: the checkpoint that the run was resumed from, wherever it is. num_done: rollbacks of the run so far.
    """

    world: World
    plan: Plan
    learner: Learner
    saver: Saver
    reporter: Reporter
    feed: Feed
    directory: Path
    start: Path | None
    limit: int
    num_done: int = 0
    uploader: Uploader | None = None

    def __call__(self, due: RollbackDue) -> int:
        """Raises NonFiniteError, on all ranks alike, when the limit is reached or there is nothing to go back to."""
        self.world.pulse.enter("rollback")
        with self.world.patient:
            return self._go_back(due)

    def _go_back(self, due: RollbackDue) -> int:
        self.saver.finish()
        # Checksums of large files take their time.
        folder = self.world.on_main_at_length(lambda: self._choose(due), "--on-nonfinite rollback")
        folder = on_every_node(self.world, folder, self.directory.parent, None)
        with self.world.collectively(f"going back to {folder}"):
            loaded = load_checkpoint(folder)
            restore(self.learner, loaded)
        step = start_progress(loaded, self.plan).step
        del loaded  # Its files are about to be replaced.
        self.num_done += 1
        self._report(due, step, folder)
        self._make_lasting(step)
        return step

    def _choose(self, due: RollbackDue) -> Path:
        what = f"{due}: {len(due.offences)} updates in a row were not finite"
        if self.num_done >= self.limit:
            raise NonFiniteError(f"{what}, and --max-rollbacks {self.limit} is reached")
        folder = self._newest_before((due.first_bad - 1) * self.plan.global_batch)
        if folder is None:
            raise NonFiniteError(f"{what}, and no checkpoint is from before them; --save-every-n-steps makes more")
        return folder

    def _newest_before(self, samples: int) -> Path | None:
        """The newest checkpoint that verifies, of those with at most `samples` seen; else where the run began."""
        for folder in [*list_checkpoints(self.directory), *([self.start] if self.start else [])]:
            try:
                if verify_checkpoint(folder).samples_seen <= samples:
                    return folder
            except CheckpointError as error:
                log.warning("passed over: %s", error)
        return None

    def _report(self, due: RollbackDue, step: int, folder: Path) -> None:
        passed_over = (due.last_done - step) * self.plan.global_batch
        values: dict[str, Any] = {
            "from_step": due.last_done,
            "to_step": step,
            "samples_passed_over": passed_over,
            "number": self.num_done,
            "offences": due.offences,
        }
        self.reporter.rewind(step)
        self.reporter.event(
            step,
            f"went back from step {due.last_done} to {step} ({folder}); the {passed_over} samples between are passed "
            f"over (rollback {self.num_done} of --max-rollbacks {self.limit})",
            {"event/rollback": values},
        )

    def _make_lasting(self, step: int) -> None:
        """Checkpoints of the future that is given up go away: the newest must be the one that the run goes on from."""
        with self.world.collectively("--on-nonfinite rollback"):
            if self.world.is_main:
                discard(self._beyond(step * self.plan.global_batch))
                # Order matters: what is still here counts as wanted there.
                if self.uploader is not None:
                    self.uploader.rewind(step * self.plan.global_batch)
        self.saver.save_again(step, self.feed, {"rollbacks": self.num_done})

    def _beyond(self, samples: int) -> list[Path]:
        """Whole checkpoints with more than `samples` seen; damaged ones are a case for a human."""
        found = []
        for folder in list_checkpoints(self.directory):
            with contextlib.suppress(CheckpointError):
                if verify_checkpoint(folder, checksums=False).samples_seen > samples:
                    found.append(folder)
        return found


def rollbacks_of(loaded: LoadedCheckpoint | None) -> int:
    """How often the run had gone back when `loaded` was written."""
    return 0 if loaded is None else int(loaded.state.get("rollbacks", 0))
