"""Keeps a second copy of a run at its remote, from a thread of rank 0, without the run ever waiting for it.

Owns what is uploaded next, when it is tried again, and what rotation leaves there. Knows no model and no ranks; how a
remote is written so that nobody reads half of it is `training.remote`'s business.

Nothing is queued: each round looks at what the run folder holds and brings the newest checkpoint and every epoch's.
Step checkpoints that were overtaken while another one was on its way are left out.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

from training.checkpoint_files import list_checkpoints
from training.distributed import World
from training.errors import RemoteError
from training.manifest import newest_first, parse_manifest, read_manifest_text
from training.metrics import EVALUATIONS_FILE
from training.metrics import FILE_NAME as METRICS_FILE
from training.preemption import Preemption
from training.remote import CHECKPOINTS, Remote, Replaced, insist
from training.rotation import unwanted

log = logging.getLogger(__name__)

BESIDE = ("config.yaml", METRICS_FILE, EVALUATIONS_FILE)
# For the last upload. Who sends a signal and does not say when the end is, kills soon.
_AT_MOST_S = 600.0
_PREEMPTED_S = 60.0
_BEFORE_END_S = 15.0
_AFTER_ERROR_S = 30.0
_POLL_S = 1.0


class Uploader:
    """Copies `<run_dir>/checkpoints/` and the files beside it to `remote`, by the rotation of the run itself.

    on_uploaded: told the seconds that each checkpoint took.
    every_s: seconds after which what failed is tried again, and the metrics between checkpoints are brought.
    Works inside its context, where what an earlier process left undone comes first; `wake` says that something is new.
    Between `finish` and the end of the thread, which `ended` tells, everything is tried once more.
    """

    def __init__(
        self,
        remote: Remote,
        run_dir: Path,
        *,
        keep_last: int,
        delete_previous: bool,
        every_s: float = 300.0,
        on_uploaded: Callable[[float], None] | None = None,
    ):
        self._remote = remote
        self._run_dir = run_dir
        self._rules = {"keep_last": keep_last, "delete_previous_epochs": delete_previous}
        self._every_s = every_s
        self._on_uploaded = on_uploaded
        self._awake = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._pinned: Path | None = None
        self._given_up_from: int | None = None
        self._there: dict[str, str | None] = {}  # manifests at the remote, as far as is known
        self._beside: dict[str, bytes] = {}
        self._looked = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)

    def __enter__(self) -> Uploader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            # What is on its way is worth a moment; without an error `finish_upload` has waited.
            self.finish()
            self.ended(_AFTER_ERROR_S)

    def wake(self) -> None:
        """Something is new in the run folder."""
        self._awake.set()

    def rewind(self, samples: int) -> None:
        """The run goes on from `samples` seen: what is from beyond, and not here, is a future that is given up."""
        with self._lock:
            self._given_up_from = samples
        self.wake()

    @contextlib.contextmanager
    def rotating(self) -> Iterator[tuple[Path, ...]]:
        """Inside, no upload begins; yields the checkpoints that one is reading, which must stay."""
        with self._lock:
            yield () if self._pinned is None else (self._pinned,)

    def finish(self) -> None:
        """Try once more what is missing, then end. Does not wait."""
        self._closing.set()
        self.wake()

    def ended(self, within_s: float) -> bool:
        """Whether the thread has ended, after at most `within_s`."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def remark(self) -> str:
        """What is not at the remote and why, for the run's last line; empty when nothing is missing."""
        missing = [name for name, text in self._wanted() if self._there.get(name) != text]
        missing += [name for name in BESIDE if self._beside.get(name) != _lines_of(self._run_dir / name)]
        if not missing:
            return ""
        return f"not brought to {self._remote}: {', '.join(missing)} ({self._failure or 'there was no time'})"

    # ---- the thread

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._awake.clear()
            is_last = self._closing.is_set()
            try:
                self._bring_everything()
            except Exception as error:  # nothing that happens to a copy may touch the run
                self._has_failed(error)
            else:
                self._works_again()
            if not is_last:
                self._awake.wait(self._every_s)

    def _bring_everything(self) -> None:
        self._known()
        self._drop_given_up()
        self._bring_beside()
        while (found := self._next()) is not None:
            name, text = found
            # Order matters: where a checkpoint is, the numbers up to it are too.
            self._bring_beside()
            with contextlib.suppress(Replaced):
                self._bring(name, text)
            self._drop_given_up()
        self._rotate()

    def _bring(self, name: str, text: str) -> None:
        folder = self._run_dir / CHECKPOINTS / name
        self._known()[name] = None
        started = time.monotonic()
        try:
            size = insist(lambda: self._remote.upload(folder, text))
        finally:
            with self._lock:
                self._pinned = None
        self._known()[name] = text
        if self._on_uploaded is not None:
            self._on_uploaded(time.monotonic() - started)
        log.info("uploaded %s to %s (%.0f MiB)", name, self._remote, size / 2**20)
        self._rotate()

    def _next(self) -> tuple[str, str] | None:
        """The checkpoint to bring now. Local rotation leaves it alone until it is there."""
        there = self._known()
        with self._lock:
            for name, text in self._wanted():
                if there.get(name) != text:
                    self._pinned = self._run_dir / CHECKPOINTS / name
                    return name, text
        return None

    def _wanted(self) -> list[tuple[str, str]]:
        """What should be at the remote, by (name, manifest): the newest checkpoint and every epoch's that stays."""
        local = self._local()
        leave = unwanted(list(local), **self._rules)  # type: ignore[arg-type]
        names = [name for name in local if name.startswith("epoch_") and name not in leave]
        names = list(dict.fromkeys([*list(local)[:1], *names]))
        return [(name, local[name]) for name in names]

    def _local(self) -> dict[str, str]:
        """Manifests of the run folder's checkpoints, newest first."""
        texts = {folder.name: read_manifest_text(folder) for folder in list_checkpoints(self._run_dir / CHECKPOINTS)}
        return {name: text for name, text in texts.items() if text is not None and parse_manifest(text) is not None}

    def _bring_beside(self) -> None:
        for name in BESIDE:
            content = _lines_of(self._run_dir / name)
            if content is not None and self._beside.get(name) != content:
                insist(partial(self._remote.write, name, content))
                self._beside[name] = content

    def _rotate(self) -> None:
        there, local = self._known(), self._local()
        half = [name for name, text in there.items() if text is None and name not in local]
        whole = [name for _, name in newest_first(there)]
        # What is wanted stays, or it would come and go for ever where the remote holds what is newer than the run.
        kept = dict(self._wanted())
        for name in half + unwanted(whole, **self._rules):  # type: ignore[arg-type]
            if name not in kept:
                self._discard(name)

    def _drop_given_up(self) -> None:
        with self._lock:
            samples = self._given_up_from
        if samples is None:
            return
        local = self._local()
        for name, text in list(self._known().items()):
            manifest = parse_manifest(text)
            # What has been saved since is of the future that the run has chosen.
            if manifest is not None and manifest.samples_seen > samples and local.get(name) != text:
                self._discard(name)
        with self._lock:
            if self._given_up_from == samples:
                self._given_up_from = None

    def _discard(self, name: str) -> None:
        insist(lambda: self._remote.discard(name))
        self._known().pop(name, None)

    def _known(self) -> dict[str, str | None]:
        if not self._looked:
            self._there, self._beside = insist(self._remote.manifests), {}
            self._looked = True
        return self._there

    # ---- failures

    def _has_failed(self, error: Exception) -> None:
        is_new, self._failure = self._failure is None, str(error) or type(error).__name__
        self._looked = False  # whatever has happened there, it is looked at anew
        with self._lock:
            self._pinned = None
        if is_new:
            foreseen = isinstance(error, RemoteError)
            again = f"the run goes on; tried again at each checkpoint and every {self._every_s:g} s"
            log.warning("%s; %s", self._failure, again, exc_info=not foreseen)

    def _works_again(self) -> None:
        if self._failure is not None:
            self._failure = None
            log.info("--remote-sync: %s works again and has everything", self._remote)


def finish_upload(uploader: Uploader | None, world: World, preemption: Preemption) -> str:
    """Wait on all ranks until all is at the remote, or the time for that is over; what is missing then, on rank 0.

    `uploader`: rank 0's. Other ranks wait too: launchers end what outlives its peers for long.
    """
    started = time.monotonic()

    def is_done(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while uploader is not None and not uploader.ended(within_s=_POLL_S):
            if _seconds_left(preemption, started) <= 0:
                break
            if time.monotonic() >= deadline:
                return False
        return True

    if uploader is not None:
        uploader.finish()
        if not uploader.ended(within_s=_POLL_S):
            log.info("waiting for the upload, at most %.0f s", max(0, _seconds_left(preemption, started)))
    world.wait_for(is_done)
    return "" if uploader is None else uploader.remark()


def _seconds_left(preemption: Preemption, started: float) -> float:
    """For the last upload: until shortly before the job's end, if that is near; else a fixed time."""
    to_end = preemption.seconds_to_end()
    if to_end is not None and to_end <= _AT_MOST_S:
        return to_end - _BEFORE_END_S
    return started + (_AT_MOST_S if preemption.requested() is None else _PREEMPTED_S) - time.monotonic()


def _lines_of(path: Path) -> bytes | None:
    """The file's whole lines; None where there is no file. The last one may be on its way."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[: content.rfind(b"\n") + 1]
