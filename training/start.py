"""Where a run begins: anew, from pretrained weights, or at a checkpoint, of which the newest may be at the remote.

Reads folders, and fetches into the run's own what it goes on from. The decision is made on the main rank and shared,
so that no two ranks can see different folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training.checkpoint_files import list_checkpoints, verify_checkpoint
from training.errors import CheckpointError, ConfigError, RemoteError
from training.manifest import MANIFEST, age_key, parse_manifest, read_manifest_text
from training.metrics import EVALUATIONS_FILE
from training.metrics import FILE_NAME as METRICS_FILE
from training.remote import CHECKPOINTS, Remote, in_time, insist, remote_checkpoint
from training.rotation import clean_leftovers
from training.secrets import mask_text

if TYPE_CHECKING:
    from training.distributed import World

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
    """Go on from `folder`, which verified; `passed_over` lists newer ones that did not, and why."""

    folder: Path
    step: int
    reason: str
    passed_over: tuple[tuple[str, str], ...] = ()


StartState = Fresh | Pretrained | Resume


Opener = Callable[[], Remote]


def decide_start(
    world: World,
    run_dir: Path,
    *,
    resume: str | None,
    pretrained: str | None,
    opener: Opener | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> StartState:
    """`choose_start` on the main rank, its answer or its error on every rank; StoppedEarly if one is asked to stop."""
    # Collective: every rank asks, one looks; checksums of large files, or fetching them, take their time.
    return world.on_main_at_length(
        lambda: choose_start(run_dir, resume=resume, pretrained=pretrained, opener=opener), "--resume", should_stop
    )


def choose_start(
    run_dir: Path, *, resume: str | None, pretrained: str | None, opener: Opener | None = None
) -> StartState:
    """The start of the run in `run_dir`; a found checkpoint wins over `pretrained`. `reason` is for the console.

    opener: opens the run's remote, or raises RemoteError when it does not answer.
    Raises ConfigError when the run exists and `resume` is not given; CheckpointError when `resume` names a
    folder that does not verify, or when there are checkpoints and none of them does; RemoteError when the run may
    be at the remote and nobody there says whether.
    """
    if resume is None:
        _refuse_existing(run_dir, opener() if opener else None)
        return _begin(pretrained, "")
    remote, silence = _open(opener)
    if resume == LATEST:
        return _latest(run_dir, pretrained, remote, silence)
    return _named(run_dir, resume, remote, silence)


def _open(opener: Opener | None) -> tuple[Remote | None, str]:
    """The remote, or why there is no asking it."""
    try:
        return (opener() if opener else None), ""
    except RemoteError as error:
        return None, str(error)


def _begin(pretrained: str | None, why: str) -> StartState:
    if pretrained is None:
        return Fresh(f"{why}starting from initial weights")
    return Pretrained(pretrained, f"{why}starting from the weights of {pretrained}")


def _refuse_existing(run_dir: Path, remote: Remote | None) -> None:
    metrics = run_dir / METRICS_FILE
    found: object = None
    if list_checkpoints(run_dir / CHECKPOINTS) or (metrics.exists() and metrics.stat().st_size > 0):
        found = run_dir
    elif remote is not None and any(in_time(remote.manifests, str(remote)).values()):
        found = remote
    if found is not None:
        raise ConfigError(
            f"--name: the run {found} exists already; add --resume {LATEST} to go on with it, or choose another --name"
        )


# ---- the newest


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint that may be the one; `take` verifies it, fetches it if need be, and returns its local folder."""

    place: str
    take: Callable[[], Path]


def _latest(run_dir: Path, pretrained: str | None, remote: Remote | None, silence: str) -> StartState:
    directory = run_dir / CHECKPOINTS
    clean_leftovers(directory)
    there: dict[str, str | None] = {}
    if remote is not None:
        try:
            there = in_time(remote.manifests, str(remote))
        except RemoteError as error:
            silence = str(error)
    notes = [f"{name} at {remote} is not whole (it has no {MANIFEST})" for name, text in there.items() if text is None]
    where = f"{directory} or at {remote}" if remote is not None else str(directory)
    found = _first_whole(_candidates(run_dir, remote, there), notes, where)
    if found is not None:
        unasked = f"; there may be a newer one: {silence}" if silence else ""
        return replace(found, reason=found.reason + unasked)
    if silence:
        raise RemoteError(f"{silence}; without a checkpoint in {directory}, nobody knows how far the run has come")
    return _begin(pretrained, f"no checkpoint in {where} yet: ")


def _candidates(run_dir: Path, remote: Remote | None, there: dict[str, str | None]) -> Iterator[_Candidate]:
    """Newest first; of equal ones the local one. What has no manifest at the remote was never whole there."""
    local = {folder.name: read_manifest_text(folder) for folder in list_checkpoints(run_dir / CHECKPOINTS)}
    found = [(age_key(name, parse_manifest(text)), True, name) for name, text in local.items()]
    found += [(age_key(name, parse_manifest(text)), False, name) for name, text in there.items() if text is not None]
    for _, is_local, name in sorted(found, reverse=True):
        folder = run_dir / CHECKPOINTS / name
        if is_local:
            yield _Candidate(str(folder), partial(_verified, folder))
        elif remote is not None:
            yield _Candidate(f"{remote}/{CHECKPOINTS}/{name}", partial(_fetch, remote, name, run_dir))


def _first_whole(candidates: Iterator[_Candidate], notes: list[str], where: str) -> Resume | None:
    """Raises CheckpointError when there are some and none is whole; RemoteError where another try may help."""
    passed_over: list[tuple[str, str]] = []
    failure: CheckpointError | None = None
    for candidate in candidates:
        try:
            folder = candidate.take()
        except CheckpointError as error:
            passed_over.append((candidate.place, str(error)))
            failure = error if failure is None or isinstance(error, RemoteError) else failure
            continue
        step = verify_checkpoint(folder, checksums=False).step
        fetched = "" if candidate.place == str(folder) else f", fetched from {candidate.place}"
        skipped = "".join(f"; passed over: {reason}" for reason in [*(reason for _, reason in passed_over), *notes])
        return Resume(folder, step, f"resuming from {folder} (step {step}){fetched}{skipped}", tuple(passed_over))
    if failure is not None:
        # Starting anew here would spend the whole run again without anybody having decided so.
        kind = RemoteError if isinstance(failure, RemoteError) else CheckpointError
        raise kind(
            f"--resume {LATEST}: none of the {len(passed_over)} checkpoints in {where} is whole "
            f"({passed_over[0][1]}); repair or move them, or choose another --name"
        ) from failure
    return None


def _verified(folder: Path) -> Path:
    verify_checkpoint(folder)
    return folder


def _fetch(remote: Remote, name: str, run_dir: Path) -> Path:
    """The checkpoint, and the run's numbers up to it: they are at the remote wherever one of its checkpoints is."""
    # Order matters: a kill after the checkpoint has come must not leave it without its numbers.
    _fetch_beside(remote, METRICS_FILE, run_dir)
    # Where the run's folder is shared, who evaluates beside the training writes there, and has all of it.
    if not (run_dir / EVALUATIONS_FILE).exists():
        _fetch_beside(remote, EVALUATIONS_FILE, run_dir)
    return remote.fetch(name, run_dir / CHECKPOINTS)


def _fetch_beside(remote: Remote, file: str, run_dir: Path) -> None:
    content = insist(lambda: remote.read(file))
    if content is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = run_dir / f"{file}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, run_dir / file)


# ---- the named


def _named(run_dir: Path, resume: str, remote: Remote | None, silence: str) -> Resume:
    """A path, a URL, or the bare name of a checkpoint of this run."""
    folder, fetched = Path(resume), ""
    own = run_dir / CHECKPOINTS / resume
    if "://" in resume:
        folder, fetched = _from_url(resume, run_dir, remote), f", fetched from {resume}"
    elif not folder.exists() and own.is_dir():
        folder = own
    elif not folder.exists() and remote is not None and in_time(remote.manifests, str(remote)).get(resume):
        folder, fetched = _fetch(remote, resume, run_dir), f", fetched from {remote}"
    if folder.is_file():
        raise CheckpointError(f"--resume takes a checkpoint folder; for the weights of {folder} use --pretrained")
    step = verify_checkpoint(folder).step
    note = f"; {silence}" if silence else ""
    return Resume(folder, step, f"resuming from {folder} (step {step}){fetched}, as --resume says{note}")


def _from_url(url: str, run_dir: Path, remote: Remote | None) -> Path:
    """The checkpoint at `url` as one of this run's, under its own name; fetched unless it is here already."""
    source, name = remote_checkpoint(url)
    folder = run_dir / CHECKPOINTS / name
    if (here := parse_manifest(read_manifest_text(folder))) is not None:
        if here != parse_manifest(in_time(lambda: source.manifest_text(name), str(source))):
            raise CheckpointError(
                f"--resume {mask_text(url)}: {folder} is another checkpoint of that name; choose another --name"
            )
        return folder
    if remote is not None and url.rstrip("/") == f"{remote.url}/{CHECKPOINTS}/{name}":
        return _fetch(remote, name, run_dir)
    return source.fetch(name, run_dir / CHECKPOINTS)
