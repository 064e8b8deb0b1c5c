"""A copy of the code as it is submitted, so that a requeue hours later runs the same. Knows git, not Slurm."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.errors import ConfigError
from training.secrets import mask_text

PACKAGES = ("training", "models", "data", "scripts", "configs", "slurm")  # where git does not say what is code
SITE = "slurm/site.sh"  # ignored by git, needed by a job
MAX_UNTRACKED_MIB = 100
_MIB = 1 << 20


@dataclass(frozen=True)
class Code:
    """What a snapshot will hold: files relative to `root`, and what is known of them.

    commit: for people; changes: the difference to it; left_out: files with credentials, which are not copied.
    """

    root: Path
    files: tuple[str, ...]
    digest: str
    commit: str
    changes: str
    left_out: tuple[str, ...]


def survey(root: Path, without: Path) -> Code:
    """The code below `root`, `without` one folder (of runs). Raises ConfigError when that is more than code."""
    tracked = _git_files(root, "--cached")
    found = tracked if tracked is not None else [_name(root, path) for room in PACKAGES for path in _walk(root / room)]
    untracked = [name for name in _git_files(root, "--others", "--exclude-standard") or [] if name not in set(found)]
    untracked += [SITE] if (root / SITE).is_file() and SITE not in {*found, *untracked} else []
    untracked = [name for name in untracked if not (root / name).resolve().is_relative_to(without.resolve())]
    _refuse_large(root, untracked)
    left_out = [name for name in untracked if _holds_secret(root / name)]
    files = sorted(name for name in {*found, *untracked} - {*left_out} if _is_file(root / name))
    commit, changes = _git_state(root) if tracked is not None else ("no git checkout", "")
    return Code(root, tuple(files), _digest(root, files), commit, changes, tuple(left_out))


def snapshot(code: Code, parent: Path) -> tuple[Path, bool]:
    """(the folder `parent/<digest>` with the code, whether it was copied now). Whole or absent, at any time."""
    folder = parent / code.digest
    if folder.is_dir():
        return folder, False
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".copying-", dir=parent))
    try:
        for name in code.files:
            _copy(code.root, name, temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # else another submission was faster
            raise
    return folder, True


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else None


def _git_files(root: Path, *which: str) -> list[str] | None:
    listed = _git(root, "ls-files", "-z", *which)
    return [name for name in listed.split("\0") if name] or None if listed is not None else None


def _git_state(root: Path) -> tuple[str, str]:
    """The commit as people name it, and the difference of tracked files to it."""
    commit = (_git(root, "rev-parse", "HEAD") or "no commit yet").strip()
    described = (_git(root, "describe", "--always", "--dirty", "--tags") or "").strip()
    branch = (_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "").strip()
    changes = mask_text(_git(root, "diff", "--no-ext-diff", "--no-color", "HEAD", "--", ".") or "")
    return f"{commit} ({described}, branch {branch})", changes


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _is_file(path: Path) -> bool:
    """A submodule is a folder to us, a deleted file nothing."""
    return path.is_symlink() or path.is_file()


def _refuse_large(root: Path, names: Sequence[str]) -> None:
    sizes = {name: (root / name).lstat().st_size for name in names if _is_file(root / name)}
    if sum(sizes.values()) > MAX_UNTRACKED_MIB * _MIB:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"{root} holds {sum(sizes.values()) / _MIB:.0f} MiB that git neither tracks nor ignores, too much for code "
            f"(the largest: {largest}); add it to .gitignore, or move it"
        )


def _holds_secret(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    text = path.read_bytes().decode(errors="replace")
    return mask_text(text) != text


def _digest(root: Path, files: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in files:
        path = root / name
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        runs = os.access(path, os.X_OK)
        total.update(f"{name}\0{runs}\0{len(content)}\0".encode(errors="surrogateescape"))
        total.update(content)
    return total.hexdigest()[:12]


def _copy(root: Path, name: str, target: Path) -> None:
    """Read-only: what a queued job will run is not to be edited by accident. Links stay links to the same file."""
    source, copy = root / name, target / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        inside = source.resolve().is_relative_to(root.resolve())
        copy.symlink_to(os.readlink(source) if inside else source.resolve())
        return
    shutil.copyfile(source, copy)
    copy.chmod(0o555 if os.access(source, os.X_OK) else 0o444)
