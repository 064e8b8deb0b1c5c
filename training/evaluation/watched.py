"""The run that is watched: which checkpoints it has, and one of them at hand; in a folder, or at any URL.

Reads only. Knows checkpoints as names, manifests and files; knows no model, and not what is wanted of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import yaml

from training.checkpoint_files import list_checkpoints
from training.errors import RemoteError
from training.folder import RunFolder
from training.manifest import Manifest, newest_first, parse_manifest, read_manifest_text
from training.remote import CHECKPOINTS, Remote, insist

CONFIG_FILE = "config.yaml"


class WatchedRun(Protocol):
    """A run whose trainer may be writing. All but `name` may raise RemoteError: another try may succeed."""

    @property
    def name(self) -> str:
        """The run's own."""

    def exists(self) -> bool:
        """False before the trainer has made its folder."""

    def manifests(self) -> dict[str, str | None]:
        """Name of each checkpoint -> the text of its manifest."""

    def manifest_text(self, name: str) -> str | None:
        """That of one checkpoint; None where it has gone."""

    def read(self, file: str) -> bytes | None:
        """A small file of the run, by its path in there; None where there is none."""

    def bring(self, name: str, files: Collection[str]) -> Path:
        """A local folder with these files of a checkpoint; to be called once on each node."""

    def path_of(self, name: str) -> Path:
        """Where `bring` has put it, for the node's other ranks."""

    def let_go(self) -> None:
        """What was brought is not needed any more."""


class LocalRun:
    """A run in a folder that this machine sees."""

    def __init__(self, path: Path):
        self._folder = RunFolder(path)

    @property
    def name(self) -> str:
        return self._folder.path.resolve().name

    def exists(self) -> bool:
        return self._folder.path.is_dir()

    def manifests(self) -> dict[str, str | None]:
        return {path.name: read_manifest_text(path) for path in list_checkpoints(self._folder.checkpoints)}

    def manifest_text(self, name: str) -> str | None:
        return read_manifest_text(self._folder.checkpoints / name)

    def read(self, file: str) -> bytes | None:
        with contextlib.suppress(OSError):
            return (self._folder.path / file).read_bytes()
        return None

    def bring(self, name: str, files: Collection[str]) -> Path:
        return self.path_of(name)

    def path_of(self, name: str) -> Path:
        return self._folder.checkpoints / name

    def let_go(self) -> None:
        """It stays where it is."""


class RemoteRun:
    """A run at a URL. One checkpoint at a time is in `scratch`, in a folder of this run and these figures alone.

    That folder's name is always the same, so that what a killed process has left there gives way to the next one's.
    """

    def __init__(self, url: str, scratch: Path, output: Path):
        self._remote = Remote(url)
        owner = hashlib.sha256(f"{self._remote.url} {output.resolve()}".encode()).hexdigest()[:12]
        self._scratch = scratch / f"clipyard-watch-{owner}"

    @property
    def name(self) -> str:
        return self._remote.url.rpartition("/")[2]

    def exists(self) -> bool:
        return True

    def manifests(self) -> dict[str, str | None]:
        with _told_as_run():
            return insist(self._remote.manifests)

    def manifest_text(self, name: str) -> str | None:
        with _told_as_run():
            return insist(lambda: self._remote.manifest_text(name))

    def read(self, file: str) -> bytes | None:
        with _told_as_run():
            return insist(lambda: self._remote.read(file))

    def bring(self, name: str, files: Collection[str]) -> Path:
        self.let_go()
        with _told_as_run():
            return self._remote.fetch(name, self._scratch, files)

    def path_of(self, name: str) -> Path:
        return self._scratch / name

    def let_go(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)


def open_run(run: str, scratch: Path, output: Path | None) -> WatchedRun:
    """The run that a folder or a URL names; `output` is where figures of one at a URL go. Asks nobody."""
    if "://" not in run:
        return LocalRun(Path(run))
    assert output is not None
    return RemoteRun(run, scratch, output)


@contextmanager
def _told_as_run() -> Iterator[None]:
    """The remote of a run is named by a flag of the trainer's; here it is an argument."""
    try:
        yield
    except RemoteError as error:
        raise type(error)(str(error).replace("--remote-sync", "RUN", 1)) from error


# ---- what checkpoints say


def oldest_first(manifests: dict[str, str | None]) -> list[tuple[str, Manifest]]:
    """The whole checkpoints; what has no manifest that can be read is none."""
    parsed = {name: parse_manifest(text) for name, text in manifests.items()}
    names = [name for _, name in reversed(newest_first(manifests))]
    return [(name, manifest) for name in names if (manifest := parsed[name]) is not None]


def is_last(run: WatchedRun, name: str, manifest: Manifest) -> bool:
    """True when the run, as its trainer was last told, ends at this checkpoint. False where nobody says."""
    for file in (CONFIG_FILE, f"{CHECKPOINTS}/{name}/{CONFIG_FILE}"):
        with contextlib.suppress(yaml.YAMLError, KeyError, TypeError):
            return manifest.epoch >= int(yaml.safe_load(run.read(file) or b"")["epochs"])
    return False
