"""Saving the checkpoints of a run: a snapshot to host memory, written behind the training.

Knows when what is written and what is told of it, not what a checkpoint holds (`training.checkpoint_content`) nor how a
folder is made safe (`training.checkpoint_files`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from training.checkpoint_content import MODEL_FILE, OPTIMIZER_FILE, Progress, documents
from training.checkpoint_files import write_checkpoint
from training.errors import CheckpointWriteError
from training.host_copy import HostCopy
from training.optimizer_state import OptimizerState
from training.rotation import clean_leftovers, rotate

if TYPE_CHECKING:
    from training.distributed import World
    from training.uploader import Uploader

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves the checkpoints of a run into `directory`. On ranks other than the main one every method returns at once.

    keep_last: step checkpoints kept; those of epochs stay unless `delete_previous`.
    uploader: told of each checkpoint; rotation leaves alone what it is reading.
    before_write: makes lasting what a checkpoint must not outlive, in the thread that writes.
    on_saved: told the seconds of each.
    A failed write is raised as CheckpointWriteError by the next `check`, `save`, `wait` or `close`, and by each
    after it: the caller shares it with the other ranks.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        keep_last: int = 2,
        delete_previous: bool = False,
        uploader: Uploader | None = None,
        before_write: Callable[[], None] | None = None,
        on_saved: Callable[[float], None] | None = None,
    ):
        self._directory = directory
        self._world = world
        self._keep_last = keep_last
        self._delete_previous = delete_previous
        self._uploader = uploader
        self._before_write = before_write
        self._on_saved = on_saved
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: CheckpointWriteError | None = None
        if world.is_main:
            _prepare(directory)

    def reserve(
        self,
        model_state: Mapping[str, Tensor],
        optimizer_state: OptimizerState,
        further: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Allocate the host memory of a snapshot in the background, so that the first save need not.

        To be called after the first optimiser step, when the optimiser's state exists. Reads only shapes.
        """
        if self._world.is_main:
            self.wait()
            files = _tensor_files(model_state, optimizer_state, further)
            self._in_background(lambda: self._host.reserve(files), "reserve memory for checkpoints")

    def save(
        self,
        name: str,
        *,
        progress: Progress,
        model_state: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor],
        data_position: Any,
        config: Mapping[str, Any],
        model_config: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        further: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Copy the state to host memory, then write `directory/name` behind the caller's back.

        model_state: full weights under OpenCLIP's names, on any device. further: file name -> tensors, such as the
        averaged weights. All states are gone through once, in order.
        data_position, config (flat), model_config, extra: what JSON can hold; `extra` joins the state (e.g.
        `wandb_run_id`). Waits for the previous write first. The tensors may change as soon as this returns.
        """
        if not self._world.is_main:
            return
        self.wait()
        started = time.perf_counter()
        tensors = self._host.copy(_tensor_files(model_state, optimizer_state, further))
        texts = documents(progress, data_position, config, model_config, extra or {}, self._world.size)
        stall = time.perf_counter() - started
        self._in_background(
            lambda: self._write(self._directory / name, tensors, texts, progress, stall), f"write checkpoint {name}"
        )

    def check(self) -> None:
        """Raise if a write has failed; does not wait."""
        if self._error is not None:
            raise self._error

    def is_idle(self, within_s: float) -> bool:
        """Whether nothing is being written, after at most `within_s`."""
        if self._thread is not None:
            self._thread.join(within_s)
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when nothing is being written; raise if a write has failed."""
        self._join()
        self.check()

    def close(self) -> None:
        """The same as `wait`, and the host memory is given back."""
        self._join()
        self._host = HostCopy()
        self.check()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The error that ends the run is the one to be seen; a write under way is still worth finishing.
        self._join()
        if self._error is not None and self._error is not error:
            logger.error("%s", self._error)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _in_background(self, work: Callable[[], None], what: str) -> None:
        def guarded() -> None:
            try:
                with self._world.pulse.unfinished(what):
                    work()
            except CheckpointWriteError as error:
                self._error = error
            except Exception as error:  # whatever it is, it must reach the training thread
                self._error = CheckpointWriteError(f"cannot {what}: {type(error).__name__}: {error}")

        self._thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(
        self,
        folder: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, Any],
        progress: Progress,
        stall_s: float,
    ) -> None:
        started = time.perf_counter()
        if self._before_write is not None:
            self._before_write()
        manifest = write_checkpoint(folder, tensors, texts, **asdict(progress))
        seconds = time.perf_counter() - started
        mib = sum(entry.size for entry in manifest.files.values()) / 2**20
        logger.info("saved %s: %.0f MiB written in %.1f s, training stood %.2f s", folder, mib, seconds, stall_s)
        if self._on_saved is not None:
            self._on_saved(stall_s + seconds)
        if self._uploader is not None:
            self._uploader.wake()
        try:
            self._rotate(folder)
        except OSError as error:
            logger.warning("cannot delete old checkpoints: %s", error)

    def _rotate(self, newest: Path) -> None:
        with nullcontext(()) if self._uploader is None else self._uploader.rotating() as in_use:
            rotate(
                self._directory,
                keep_last=self._keep_last,
                delete_previous_epochs=self._delete_previous,
                keep=(newest, *in_use),
            )


def _prepare(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointWriteError(f"cannot create {directory}: {error.strerror}") from error
    clean_leftovers(directory)


def _tensor_files(
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    further: Mapping[str, Mapping[str, Tensor]] | None,
) -> dict[str, Mapping[str, Tensor]]:
    return {MODEL_FILE: model_state, OPTIMIZER_FILE: optimizer_state, **(further or {})}
