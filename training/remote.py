"""The folder of one run at a remote, any fsspec URL: checkpoints in and out, so that no reader takes half of one.

Owns the order of what is written and removed there: a checkpoint's manifest comes last and goes first. Knows the
checkpoint folder as files; knows neither threads, nor when something is due (`training.uploader`), nor ranks.
Every method raises RemoteError, once and without insisting; `open_remote` and `probe` raise ConfigError for what no
second try would heal. The client is made on first use, by whatever thread that is, and anew after an error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from training.checkpoint_files import receive
from training.distributed import Errand
from training.errors import CheckpointError, ConfigError, RemoteError
from training.manifest import MANIFEST, Manifest, is_checkpoint_name
from training.secrets import mask_text

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

CHECKPOINTS = "checkpoints"
# At the start somebody waits; clients of some stores insist for many minutes.
ANSWER_WITHIN_S = 60.0
# Elsewhere folders are parts of names: asked for one, clients of object stores would make a missing bucket.
_HAVE_FOLDERS = {"file", "local", "sftp", "ssh", "smb", "ftp", "hdfs", "arrow_hdfs", "webhdfs", "dbfs"}
_HOPELESS_ERRNO = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_HOPELESS = (ImportError, FileNotFoundError, PermissionError, NotImplementedError, ValueError, TypeError)
_THREADS = 8
_ATTEMPTS = 3
_FIRST_PAUSE_S = 1.0


class Replaced(Exception):
    """The local checkpoint has gone, or another one has taken its name, while it was uploaded."""


class Remote:
    """Names are those of the run folder, whose URL `url` is; `checkpoints` says where in it checkpoints are."""

    def __init__(self, url: str, checkpoints: str = CHECKPOINTS):
        self.url = url.rstrip("/")
        self._checkpoints = checkpoints
        self._system: AbstractFileSystem | None = None
        self._root = ""

    def __str__(self) -> str:
        return mask_text(self.url)

    # ---- what is there

    def probe(self) -> None:
        """Write, read and remove a small object. Raises ConfigError where no second try would help."""
        name = f"probe-{socket.gethostname()}-{os.getpid()}"
        with self._asking("cannot be written", hopeless=ConfigError):
            self._make_folder("")
            self._fs.pipe_file(self._path(name), b"probe")
            self._fs.rm_file(self._path(name))

    def manifests(self) -> dict[str, str | None]:
        """Name of each checkpoint -> the text of its manifest; None where it has none, and so is none."""
        with self._asking("cannot be listed"), ThreadPoolExecutor(_THREADS) as pool:
            names = self._names()
            return dict(zip(names, pool.map(self._manifest_text, names), strict=True))

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        with self._asking("cannot be read"), contextlib.suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(self._path(name)))
        return None

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._path(self._checkpoints), detail=False)
        except FileNotFoundError:
            return []
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
        return sorted(name for name in names if is_checkpoint_name(name))

    def manifest_text(self, name: str) -> str | None:
        """The manifest of a checkpoint as it stands there; None where there is none."""
        with self._asking("cannot be read"):
            return self._manifest_text(name)

    def _manifest_text(self, name: str) -> str | None:
        try:
            return bytes(self._fs.cat_file(self._in_checkpoint(name, MANIFEST))).decode(errors="replace")
        except FileNotFoundError:
            return None

    # ---- in

    def upload(self, folder: Path, manifest_text: str) -> int:
        """Bring a whole local checkpoint here, in place of what has its name. Returns the bytes.

        Raises Replaced when the folder no longer is the one that `manifest_text` describes.
        """
        manifest = Manifest.from_text(manifest_text)
        try:
            with self._asking(f"does not take {folder.name}"):
                self._put_checkpoint(folder, manifest, manifest_text)
        except RemoteError:
            _unless_replaced(folder, manifest_text)
            raise
        return sum(entry.size for entry in manifest.files.values())

    def _put_checkpoint(self, folder: Path, manifest: Manifest, manifest_text: str) -> None:
        name = folder.name
        # Order matters: without a manifest nobody takes what is a mixture from here on.
        self._remove_manifest(name)
        self._make_folder(self._name_of(name))
        for file, entry in manifest.files.items():
            target = self._in_checkpoint(name, file)
            self._fs.put_file(str(folder / file), target)
            self._fs.invalidate_cache()
            if (size := int(self._fs.size(target))) != entry.size:
                _unless_replaced(folder, manifest_text)
                raise RemoteError(f"{self}: {file} of {name} has {size} bytes there, and {entry.size} here")
        # Order matters: if the folder is still the one that we began with, every file was of it.
        _unless_replaced(folder, manifest_text)
        self._put_whole(f"{self._name_of(name)}/{MANIFEST}", manifest_text.encode())

    def write(self, name: str, content: bytes) -> None:
        """Put a small file here, whole or not at all."""
        with self._asking(f"does not take {name}"):
            self._make_folder("")
            self._put_whole(name, content)

    def _put_whole(self, name: str, content: bytes) -> None:
        target = self._path(name)
        if not self._has_folders:
            self._fs.pipe_file(target, content)  # an object appears when all of it has arrived
            return
        temporary = f"{target}.tmp"
        self._fs.pipe_file(temporary, content)
        try:
            self._fs.mv(temporary, target)
        except FileExistsError:  # not every rename replaces
            self._fs.rm_file(target)
            self._fs.mv(temporary, target)

    # ---- out

    def fetch(self, name: str, directory: Path, only: Collection[str] = ()) -> Path:
        """Bring the checkpoint `name` into the local `directory`, verified by checksums. Returns its folder.

        only: bring these files alone. What has its name there gives way to it. Raises CheckpointError when it is not
        whole.
        """
        source = f"{self}/{self._name_of(name)}"
        text = insist(lambda: self.manifest_text(name))
        if text is None:
            raise CheckpointError(f"{source} has no {MANIFEST}: it is not a whole checkpoint")

        def get(file: str, path: Path) -> None:
            insist(lambda: self._get(name, file, path))

        return receive(directory / name, source, text, get, only)

    def _get(self, name: str, file: str, path: Path) -> None:
        source = f"{self}/{self._name_of(name)}/{file}"
        try:
            with self._asking("cannot be read"):
                self._fs.get_file(self._in_checkpoint(name, file), str(path))
        except RemoteError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise CheckpointError(f"{source} is missing") from error
            raise

    # ---- away

    def discard(self, name: str) -> None:
        """Remove a checkpoint, or what is left of one."""
        with self._asking(f"does not remove {name}"):
            # Order matters: from here on nobody takes it.
            self._remove_manifest(name)
            folder = self._path(self._name_of(name))
            for path in self._fs.find(folder):
                self._fs.rm_file(path)
            # fsspec's memory has folders when they are empty, and no renames into them.
            if (self._has_folders or "memory" in _protocols(self._fs)) and self._fs.isdir(folder):
                self._fs.rmdir(folder)
            self._fs.invalidate_cache()

    def _remove_manifest(self, name: str) -> None:
        self._fs.invalidate_cache()
        path = self._in_checkpoint(name, MANIFEST)
        if self._fs.exists(path):
            self._fs.rm_file(path)
            self._fs.invalidate_cache()

    # ---- the client

    @property
    def _fs(self) -> AbstractFileSystem:
        if self._system is None:
            self._system, self._root = _client(self.url)
        return self._system

    @property
    def local_path(self) -> Path | None:
        """Where the folder is, if it is on this machine's file system."""
        return Path(self._root) if _protocols(self._fs) & {"file", "local"} else None

    @property
    def _has_folders(self) -> bool:
        return bool(_protocols(self._fs) & _HAVE_FOLDERS)

    def _path(self, name: str) -> str:
        root = self._root if self._fs is not None else ""
        return f"{root}/{name}" if name else root

    def _in_checkpoint(self, name: str, file: str) -> str:
        return self._path(f"{self._name_of(name)}/{file}")

    def _name_of(self, checkpoint: str) -> str:
        return f"{self._checkpoints}/{checkpoint}" if self._checkpoints else checkpoint

    def _make_folder(self, name: str) -> None:
        if self._has_folders:
            self._fs.makedirs(self._path(name), exist_ok=True)

    @contextlib.contextmanager
    def _asking(self, what: str, hopeless: type[Exception] = RemoteError) -> Iterator[None]:
        """Every library of a store has errors of its own: from here on they are ours, one line each."""
        try:
            yield
        except (RemoteError, CheckpointError, Replaced):
            raise
        except Exception as error:
            self._system = None
            kind = hopeless if _is_hopeless(error) else RemoteError
            raise kind(f"--remote-sync: {self} {what}: {_one_line(error)}") from error


def remote_checkpoint(url: str) -> tuple[Remote, str]:
    """Where the checkpoint folder at `url` lies, and its name there. Raises CheckpointError for another name."""
    parent, _, name = url.rstrip("/").rpartition("/")
    if not is_checkpoint_name(name):
        raise CheckpointError(
            f"--resume {mask_text(url)}: a checkpoint's folder is named epoch_<N> or step_<N>; "
            "for weights use --pretrained"
        )
    return Remote(parent, checkpoints=""), name


def run_remote(url: str, name: str) -> Remote:
    """The remote folder of the run `name` under --remote-sync `url`; asks nobody."""
    return Remote(f"{url.rstrip('/')}/{name}")


def open_remote(url: str, name: str, run_dir: Path) -> Remote:
    """The remote folder of the run `name`, found to be writable. ConfigError; RemoteError where nobody answers."""
    remote = run_remote(url, name)

    def look() -> None:
        with remote._asking("cannot be opened", hopeless=ConfigError):
            path = remote.local_path
        if path is not None and path.resolve() == run_dir.resolve():
            raise ConfigError(f"--remote-sync {url} is where the run itself is; it names a place for a second copy")
        remote.probe()

    in_time(look, f"--remote-sync: {remote}")
    return remote


def insist(work: Callable[[], T]) -> T:
    """`work` with a few attempts, spaced by growing pauses with jitter, where another one may help."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return work()
        except RemoteError as error:
            if isinstance(error.__cause__, FileNotFoundError | PermissionError):
                raise
            time.sleep(_FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))
    return work()


def in_time(work: Callable[[], T], who: str) -> T:
    """What `work` returns or raises; RemoteError when it takes too long, and then it is left to itself."""
    errand = Errand(work, "remote")
    if not errand.is_done(ANSWER_WITHIN_S):
        raise RemoteError(f"{who} does not answer within {ANSWER_WITHIN_S:g} s")
    return errand.result()


def _client(url: str) -> tuple[AbstractFileSystem, str]:
    # Imported here, so that a run without a remote has no client of any storage.
    import fsspec

    system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return system, str(root).rstrip("/")


def _protocols(system: AbstractFileSystem) -> set[str]:
    protocol = system.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


def _unless_replaced(folder: Path, manifest_text: str) -> None:
    try:
        is_same = (folder / MANIFEST).read_text(encoding="utf-8") == manifest_text
    except OSError:
        is_same = False
    if not is_same:
        raise Replaced(folder.name)


def _is_hopeless(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _HOPELESS_ERRNO:
        return True
    return isinstance(error, _HOPELESS) or "Credentials" in type(error).__name__


def _one_line(error: Exception) -> str:
    text = mask_text(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, FileNotFoundError) and " " not in text:
        text = f"no such object or bucket: {text}"  # some clients say no more than the path
    return text if len(text) <= 300 else text[:300] + "..."
