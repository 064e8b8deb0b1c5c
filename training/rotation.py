"""Which checkpoints of a run go, and how: rotation, and what killed writers left. Knows folders, not their content.

A folder that is deleted loses its name first, so that a kill in the middle leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Collection, Iterable
from pathlib import Path

from training.checkpoint_files import hidden_name, list_checkpoints, remove_tree, verify_checkpoint
from training.errors import CheckpointError

_CLOCKS_DIFFER_S = 5.0
_LEFTOVER = re.compile(r"\.(tmp|replaced|deleted)-((?:epoch|step)_\d+)-(.+)-(\d+)")


def rotate(directory: Path, *, keep_last: int, delete_previous_epochs: bool, keep: Collection[Path] = ()) -> list[Path]:
    """Delete what is no longer wanted; returns the folders deleted.

    Kept is what `unwanted` leaves, `keep`, and everything without a readable manifest: that is a case for a human.
    """
    whole = {folder.name: folder for folder in list_checkpoints(directory) if _is_whole(folder)}
    names = unwanted(list(whole), keep_last=keep_last, delete_previous_epochs=delete_previous_epochs)
    doomed = [whole[name] for name in names if whole[name] not in keep]
    discard(doomed)
    return doomed


def unwanted(names: list[str], *, keep_last: int, delete_previous_epochs: bool) -> list[str]:
    """Of whole checkpoints, newest first, those that rotation deletes; here or at a remote.

    Kept are the newest `keep_last` step checkpoints, every epoch (only the newest one if `delete_previous_epochs`),
    and the newest of all.
    """
    steps = [name for name in names if name.startswith("step_")]
    epochs = [name for name in names if name.startswith("epoch_")]
    return [
        name for name in steps[keep_last:] + (epochs[1:] if delete_previous_epochs else []) if name not in names[:1]
    ]


def discard(folders: Iterable[Path]) -> None:
    """Delete checkpoints, each of them wholly or not at all."""
    for folder in folders:
        _delete(folder)


def _is_whole(folder: Path) -> bool:
    try:
        verify_checkpoint(folder, checksums=False)
        return True
    except CheckpointError:
        return False


def _delete(folder: Path) -> None:
    """The name goes first: a kill in the middle leaves nothing that looks like a checkpoint."""
    doomed = hidden_name("deleted", folder)
    remove_tree(doomed)
    folder.rename(doomed)
    remove_tree(doomed)


def clean_leftovers(directory: Path) -> list[Path]:
    """Undo what killed writers left; returns the folders concerned. Only for the run that owns `directory`.

    A folder that was stepping aside gets its name back if no new one took it; the rest is deleted.
    Folders of processes alive on this host are left alone.
    """
    if not directory.is_dir():
        return []
    dead = [
        path for path in directory.iterdir() if (match := _LEFTOVER.fullmatch(path.name)) and _owner_died(path, match)
    ]
    for path in dead:
        match = _LEFTOVER.fullmatch(path.name)
        assert match is not None
        if match[1] == "replaced" and not path.with_name(match[2]).exists():
            path.rename(path.with_name(match[2]))
        else:
            remove_tree(path)
    return dead


def _owner_died(folder: Path, match: re.Match[str]) -> bool:
    host, pid = match[3], int(match[4])
    if host != socket.gethostname() or pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _began(pid) > folder.stat().st_mtime + _CLOCKS_DIFFER_S


def _began(pid: int) -> float:
    """When a process began, in unix seconds; 0 where the system does not tell.

    Numbers of processes come again, in containers the same few at each start: who is younger than a folder is another.
    """
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
