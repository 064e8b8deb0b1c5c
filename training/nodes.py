"""The checkpoint that a run goes on from, on every node: run folders may be on a local disk of each.

Knows ranks, run folders and the remote; decides nothing about which checkpoint it is (`training.start`).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

from training.checkpoint_files import list_checkpoints
from training.distributed import Errand, World
from training.errors import ConfigError
from training.manifest import age_key, parse_manifest, read_manifest_text
from training.remote import CHECKPOINTS, Remote, insist
from training.start import Resume, StartState

log = logging.getLogger(__name__)

# A shared file system may take a moment to show on one node what another one has just put there.
_APPEARS_WITHIN_S = 5.0


def on_every_node(world: World, chosen: Path, run_dir: Path, remote: Remote | None) -> Path:
    """The checkpoint that rank 0 goes on from, as this rank sees it; a node without it fetches it. Collective.

    run_dir: this rank's own; the path may differ from rank 0's.
    Raises ConfigError on all ranks alike, with the host's name, where a node cannot get it.
    """
    if world.size == world.local_size:
        return chosen
    is_own = world.broadcast_object(chosen.parent == run_dir / CHECKPOINTS)
    text = world.broadcast_object(read_manifest_text(chosen))
    folder = run_dir / CHECKPOINTS / chosen.name if is_own else chosen
    lacking = _hosts_without(world, folder, text)
    if lacking and remote is not None and is_own:
        _offer(world, folder, text, remote)
        _fetch(world, folder, text, remote)
        lacking = _hosts_without(world, folder, text)
    if lacking:
        raise ConfigError(
            f"{', '.join(lacking)} cannot read {folder}, which rank 0 goes on from: --logs must be on a file system "
            "that all nodes share; for resuming, --remote-sync with a copy of the run does too"
        )
    return folder


def _hosts_without(world: World, folder: Path, text: str | None) -> list[str]:
    """Names of nodes with a rank that does not see the checkpoint."""
    seen = _within(_APPEARS_WITHIN_S, lambda: read_manifest_text(folder) == text)
    if not world.any(not seen):
        return []
    return sorted({host for host in world.all_gather_object(None if seen else socket.gethostname()) if host})


def _within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _offer(world: World, folder: Path, text: str | None, remote: Remote) -> None:
    """See to it that the remote has what rank 0 goes on from: its last upload may have been cut short."""

    def upload() -> None:
        assert text is not None
        if insist(lambda: remote.manifest_text(folder.name)) != text:
            insist(lambda: remote.upload(folder, text))

    world.on_main_at_length(upload, "--remote-sync")


def _fetch(world: World, folder: Path, text: str | None, remote: Remote) -> None:
    """One rank of each node that lacks the checkpoint brings it, all nodes at the same time."""
    errand: Errand[Path] | None = None
    if world.local_rank == 0 and read_manifest_text(folder) != text:
        errand = Errand(lambda: remote.fetch(folder.name, folder.parent), "fetch")
    world.wait_for(lambda seconds: errand is None or errand.is_done(seconds))
    with world.collectively(f"fetching {folder.name} on {socket.gethostname()}"):
        if errand is not None:
            errand.result()


def refuse_newer_elsewhere(world: World, start: StartState, run_dir: Path, remote: Remote | None) -> None:
    """Where rank 0 has come to another node than last time, what it cannot see may be newer. Collective.

    Raises ConfigError on all ranks alike; with a remote, whose newest is what counts, it only warns.
    """
    if world.size == world.local_size:
        return
    local = {folder.name: read_manifest_text(folder) for folder in list_checkpoints(run_dir / CHECKPOINTS)}
    reports = world.gather_object((socket.gethostname(), local) if world.local_rank == 0 else None)
    with world.collectively("--resume latest"):
        if reports is not None:
            _check_reports([report for report in reports if report is not None], start, run_dir, remote)


def _check_reports(
    reports: list[tuple[str, dict[str, str | None]]], start: StartState, run_dir: Path, remote: Remote | None
) -> None:
    chosen = start.folder if isinstance(start, Resume) else None
    least = (-1.0, -1.0, 0, 0) if chosen is None else age_key(chosen.name, parse_manifest(read_manifest_text(chosen)))
    for host, local in reports[1:]:
        newer = [
            name
            for name, text in local.items()
            if text != reports[0][1].get(name) and (found := parse_manifest(text)) and age_key(name, found) > least
        ]
        if not newer:
            continue
        what = f"{host} has {newer[0]} in its own {run_dir}, newer than what rank 0 finds ({start.reason})"
        if remote is None:
            raise ConfigError(f"--resume latest: {what}; --logs must be shared by all nodes, or give --remote-sync")
        log.warning("%s; the remote's newest counts", what)
