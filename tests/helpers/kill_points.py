"""Signals a training process from inside, at a named place. Knows the places by functions and files of `training`.

`arm` is called in the process before the program starts. A place is passed many times in a run: when it has been
passed often enough, this is noted in a file, and the process gets the signal; SIGKILL with its whole group.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKPOINT_FILES = (
    *("model.safetensors", "optimizer.safetensors", "state.json", "data.json"),
    *("config.yaml", "model_config.json", "manifest.json"),
)
RENAMED = {"manifest.json.tmp": "uploaded manifest"}
RUN_FILES = {
    "config.yaml.tmp": "run's config.yaml",
    "metrics.jsonl": "metrics line",
    "metrics.jsonl.tmp": "metrics cut",
}
# Places that rank 0 alone passes; all of them while it has files in hand.
WRITING = (
    *(f"write {name}" for name in CHECKPOINT_FILES),
    *(f"write {name}" for name in RUN_FILES.values()),
    *("before fsync", "after fsync", "between files", "before rename: checkpoint", "after rename: checkpoint"),
    *("before rename: run's config.yaml", "before rename: metrics cut"),
    *("before rename: rotation", "deletion in rotation", "cleaning of leftovers"),
    *("snapshot", "memory of snapshots"),
)
STARTING = ("gathering of ranks", "load", "model", "preflight", "first batch")
RUNNING = (*STARTING, "verify", "step", "batch", "evaluation", "classifier", "end")
PLACES = (*WRITING, *RUNNING)
# With --remote-sync to a path.
REMOTE = (
    *("upload of a file", "upload of a manifest", "before rename: uploaded manifest", "deletion at the remote"),
    *("download", "download of a file"),
)
# Places that a process passes once at most.
ONCE = (
    *("write run's config.yaml", "before rename: run's config.yaml", "write metrics cut"),
    *("before rename: metrics cut", "memory of snapshots", "end", "download", *STARTING),
)


class Blow:
    """Counts how often a place is passed; at the given time it notes the place and sends the signal."""

    def __init__(self, place: str, passes: int, number: int, hits: str):
        self._place, self._passes, self._number, self._hits = place, passes, number, hits
        self._lock = threading.Lock()

    def is_due(self, place: str) -> bool:
        """True once, when this is the pass that counts."""
        if place != self._place:
            return False
        with self._lock:
            self._passes -= 1
            return self._passes == 0

    def fall(self) -> None:
        """SIGKILL goes to the process group, as a power cut would, and there is no return; others to the process."""
        note = os.open(self._hits, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(note, f"{self._place}\n".encode())
        os.close(note)
        if self._number == signal.SIGKILL:
            os.killpg(os.getpgid(0), signal.SIGKILL)
            threading.Event().wait()
        os.kill(os.getpid(), self._number)

    def passed(self, place: str) -> None:
        """To be called at every place."""
        if self.is_due(place):
            self.fall()


def arm(place: str, passes: int, run_dir: str, hits: str, number: int = signal.SIGKILL) -> None:
    """Send `number` when `place` has been passed `passes` times; `hits` is the file that learns of it."""
    blow = Blow(place, passes, number, hits)
    _watch_writes(blow, Path(run_dir))
    _watch_files(blow, Path(run_dir))
    _watch_functions(blow)


# ---- files


def _watch_writes(blow: Blow, run_dir: Path) -> None:
    """A file of the run is torn in the middle of one of its writes."""
    plain = Path.open

    def open_torn(self: Path, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        place = _file_place(self, run_dir)
        if place is None or "r" in mode:
            return plain(self, mode, buffering, *args, **kwargs)
        raw = _Torn(self, mode, blow, place)
        if buffering == 0:
            return raw
        binary = io.BufferedWriter(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")

    Path.open = open_torn  # type: ignore[method-assign, assignment]


class _Torn(io.FileIO):
    def __init__(self, path: Path, mode: str, blow: Blow, place: str):
        super().__init__(path, mode.replace("b", "").replace("t", ""))
        self._blow, self._place = blow, place

    def write(self, content: Any) -> int:
        if self._blow.is_due(self._place):
            written = super().write(bytes(content)[: len(content) // 2])
            self._blow.fall()
            return written
        return super().write(content)


def _file_place(path: Path, run_dir: Path) -> str | None:
    if run_dir not in path.parents:
        return None
    if path.parent == run_dir:
        return f"write {RUN_FILES[path.name]}" if path.name in RUN_FILES else None
    return f"write {path.name}" if path.parent.name.startswith(".tmp-") else None


def _watch_files(blow: Blow, run_dir: Path) -> None:
    """Renames and deletions in the run's folder, and what makes them last."""
    fsync, deletes = os.fsync, threading.local()

    def watched_fsync(descriptor: int) -> None:
        blow.passed("before fsync")
        fsync(descriptor)
        blow.passed("after fsync")

    os.fsync = watched_fsync

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and (place := _rename_place(*map(str, arguments[:2]))):
            blow.passed(f"before rename: {place}")
        elif event == "shutil.rmtree":
            match = re.match(r"\.(deleted|tmp)-", os.path.basename(arguments[0]))
            deletes.place = match and {"deleted": "deletion in rotation", "tmp": "cleaning of leftovers"}[match[1]]
        elif event == "os.remove" and getattr(deletes, "place", None):
            blow.passed(deletes.place)

    sys.addaudithook(hook)


def _rename_place(source: str, target: str) -> str | None:
    name = os.path.basename(source)
    if name.startswith(".tmp-"):
        return "checkpoint"
    if os.path.basename(target).startswith(".deleted-"):
        return "rotation"
    return (RUN_FILES | RENAMED).get(name)


# ---- functions


def _watch_functions(blow: Blow) -> None:
    from fsspec.implementations.local import LocalFileSystem

    import data
    import training.distributed
    import training.facts
    import training.run
    from training import checkpoint, checkpoint_files
    from training.evaluation import evaluator, tasks
    from training.feed import Feed
    from training.remote import Remote
    from training.step import TrainStep

    def before(owner: Any, name: str, place: str) -> None:
        _wrap(owner, name, lambda call: (blow.passed(place), call())[1])

    def after(owner: Any, name: str, place: str) -> None:
        _wrap(owner, name, lambda call: (call(), blow.passed(place))[0])

    before(Remote, "_put_whole", "upload of a manifest")
    before(Remote, "fetch", "download")
    before(LocalFileSystem, "rm_file", "deletion at the remote")
    _tear_copies(LocalFileSystem, "put_file", "upload of a file", blow)
    _tear_copies(LocalFileSystem, "get_file", "download of a file", blow)
    before(checkpoint.HostCopy, "buffer", "snapshot")
    before(checkpoint.HostCopy, "reserve", "memory of snapshots")
    after(checkpoint_files, "_write_file", "between files")
    after(checkpoint_files, "_take_name", "after rename: checkpoint")
    before(checkpoint_files, "_crc32_of_file", "verify")
    after(training.facts, "load_start", "load")
    after(TrainStep, "__call__", "step")
    after(Feed, "next", "batch")
    before(evaluator.Evaluator, "measure", "evaluation")
    after(tasks, "build_classifier", "classifier")
    before(training.distributed, "call_roll", "gathering of ranks")
    before(training.run, "build_learner", "model")
    before(data, "run_preflight", "preflight")
    before(Feed, "__init__", "first batch")
    after(training.run, "run_loop", "end")


def _wrap(owner: Any, name: str, around: Callable[[Callable[[], Any]], Any]) -> None:
    inner = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(lambda: inner(*args, **kwargs)))


def _tear_copies(system: Any, name: str, place: str, blow: Blow) -> None:
    """A copy ends in the middle of its file."""
    inner = getattr(system, name)

    def copy(self: Any, source: str, target: str, **options: Any) -> Any:
        if blow.is_due(place):
            content = Path(source).read_bytes()
            Path(target).write_bytes(content[: len(content) // 2])
            blow.fall()
        return inner(self, source, target, **options)

    setattr(system, name, copy)


# ---- samples


def note_samples(path: str) -> None:
    """Each step of this process adds a line to the file: its number and the keys of its samples."""
    from training.step import TrainStep

    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    inner = TrainStep.__call__

    def noted(self: TrainStep, batch: Any, step: int, rate: float) -> Any:
        os.write(descriptor, (json.dumps([step + 1, batch.keys]) + "\n").encode())
        return inner(self, batch, step, rate)

    TrainStep.__call__ = noted  # type: ignore[method-assign]


def samples_noted(path: Path) -> dict[int, set[tuple[str, ...]]]:
    """Step -> the keys that it consumed; more than one entry where a repeated step consumed others."""
    found: dict[int, set[tuple[str, ...]]] = {}
    for line in path.read_text().splitlines():
        step, keys = json.loads(line)
        found.setdefault(step, set()).add(tuple(keys))
    return found
