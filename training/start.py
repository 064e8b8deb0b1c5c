"""Where a run begins: anew, from pretrained weights, or at a checkpoint. Reads folders, changes nothing else.

The decision is made on the main rank and shared, so that no two ranks can see different folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.checkpoint_files import clean_leftovers, find_latest, list_checkpoints, verify_checkpoint
from training.errors import CheckpointError, ConfigError
from training.metrics import FILE_NAME as METRICS_FILE

if TYPE_CHECKING:
    from training.distributed import World

CHECKPOINTS = "checkpoints"
LATEST = "latest"


@dataclass(frozen=True)
class Fresh:
    """Initial weights from the seed."""

    reason: str


@dataclass(frozen=True)
class Pretrained:
    """Weights from `source`, everything else new."""

    source: str
    reason: str


@dataclass(frozen=True)
class Resume:
    """Go on from `folder`, which verified; `passed_over` lists newer folders that did not, and why."""

    folder: Path
    step: int
    reason: str
    passed_over: tuple[tuple[Path, str], ...] = ()


StartState = Fresh | Pretrained | Resume


def decide_start(world: World, run_dir: Path, *, resume: str | None, pretrained: str | None) -> StartState:
    """`choose_start` on the main rank, its answer or its error on every rank."""
    # Collective: every rank asks, one looks.
    return world.on_main(lambda: choose_start(run_dir, resume=resume, pretrained=pretrained))


def choose_start(run_dir: Path, *, resume: str | None, pretrained: str | None) -> StartState:
    """The start of the run in `run_dir`; a found checkpoint wins over `pretrained`. `reason` is for the console.

    Raises ConfigError when the run exists and `resume` is not given, CheckpointError when `resume` names a
    folder that does not verify, or when there are checkpoints and none of them does.
    """
    if resume is None:
        _refuse_existing(run_dir)
        return _begin(pretrained, "")
    if resume == LATEST:
        return _latest(run_dir, pretrained)
    return _named(run_dir, resume)


def _begin(pretrained: str | None, why: str) -> StartState:
    if pretrained is None:
        return Fresh(f"{why}starting from initial weights")
    return Pretrained(pretrained, f"{why}starting from the weights of {pretrained}")


def _refuse_existing(run_dir: Path) -> None:
    metrics = run_dir / METRICS_FILE
    if list_checkpoints(run_dir / CHECKPOINTS) or (metrics.exists() and metrics.stat().st_size > 0):
        raise ConfigError(
            f"--name: the run {run_dir} exists already; "
            f"add --resume {LATEST} to go on with it, or choose another --name"
        )


def _latest(run_dir: Path, pretrained: str | None) -> StartState:
    directory = run_dir / CHECKPOINTS
    clean_leftovers(directory)
    folder, passed_over = find_latest(directory)
    if folder is not None:
        skipped = "".join(f"; passed over: {reason}" for _, reason in passed_over)
        step = verify_checkpoint(folder, checksums=False).step
        return Resume(folder, step, f"resuming from {folder} (step {step}){skipped}", tuple(passed_over))
    if passed_over:
        # Starting anew here would spend the whole run again without anybody having decided so.
        raise CheckpointError(
            f"--resume {LATEST}: none of the {len(passed_over)} checkpoints in {directory} is whole "
            f"({passed_over[0][1]}); repair or move them, or choose another --name"
        )
    return _begin(pretrained, f"no checkpoint in {directory} yet: ")


def _named(run_dir: Path, resume: str) -> Resume:
    """A path, or the bare name of a checkpoint of this run."""
    folder = Path(resume)
    if not folder.exists() and (run_dir / CHECKPOINTS / resume).is_dir():
        folder = run_dir / CHECKPOINTS / resume
    if folder.is_file():
        raise CheckpointError(f"--resume takes a checkpoint folder; for the weights of {folder} use --pretrained")
    step = verify_checkpoint(folder).step
    return Resume(folder, step, f"resuming from {folder} (step {step}), as --resume says")
