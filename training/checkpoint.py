"""The checkpoint of a run: snapshot to host memory, written behind the training; and its reading back.

Knows what belongs into a checkpoint, not how a folder is made safe (`training.checkpoint_files`) nor what
a model is. Random numbers of a step are drawn under the key (seed, step, rank), so their whole state is the
seed and the step.
"""

from __future__ import annotations

import json
import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from training.checkpoint_files import clean_leftovers, rotate, verify_checkpoint, write_checkpoint
from training.errors import CheckpointError, CheckpointWriteError
from training.manifest import MANIFEST
from training.optimizer_state import OptimizerState, load_optimizer_tensors, optimizer_to_tensors
from training.secrets import mask_secrets
from training.start import CHECKPOINTS, Fresh, Pretrained, Resume, StartState, choose_start, decide_start

if TYPE_CHECKING:
    from training.distributed import World
    from training.uploader import Uploader

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
LORA_FILE = "lora.safetensors"
STATE_FILE = "state.json"
DATA_FILE = "data.json"
CONFIG_FILE = "config.yaml"
MODEL_CONFIG_FILE = "model_config.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: completed optimiser steps, completed epochs, samples of all ranks so far."""

    step: int = 0
    epoch: int = 0
    samples_seen: int = 0


def epoch_name(epoch: int) -> str:
    """The folder's name after `epoch` completed epochs."""
    return f"epoch_{epoch}"


def step_name(step: int) -> str:
    """The folder's name after `step` completed steps, between the ends of epochs."""
    return f"step_{step:09d}"


# ---- save


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
        documents = _documents(progress, data_position, config, model_config, extra or {}, self._world.size)
        stall = time.perf_counter() - started
        self._in_background(
            lambda: self._write(self._directory / name, tensors, documents, progress, stall), f"write checkpoint {name}"
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
        documents: Mapping[str, Any],
        progress: Progress,
        stall_s: float,
    ) -> None:
        started = time.perf_counter()
        if self._before_write is not None:
            self._before_write()
        manifest = write_checkpoint(folder, tensors, documents, **asdict(progress))
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


class HostCopy:
    """Host memory for a snapshot, kept from one save to the next; page-locked when the tensors are on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def reserve(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Allocate, and touch every page: the first touch costs far more than the copy itself."""
        for file, tensors in files.items():
            for key, tensor in tensors.items():
                self.buffer(file, key, tensor).zero_()

    def copy(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The same names with copies on the host, complete on return; overwritten by the next call."""
        copies: dict[str, dict[str, Tensor]] = {}
        from_gpu = False
        for file, tensors in files.items():
            copies[file] = {}
            # One at a time, and once: of a sharded model each tensor is gathered here, and exists no longer than this.
            for key, tensor in tensors.items():
                copies[file][key] = self.buffer(file, key, tensor).copy_(tensor.detach(), non_blocking=True)
                from_gpu |= tensor.is_cuda
        if from_gpu:
            # Host sync: the copies must have arrived before the optimiser goes on changing their sources.
            torch.cuda.synchronize()
        return copies

    def buffer(self, file: str, key: str, tensor: Tensor) -> Tensor:
        """The memory for a tensor like this one under these names."""
        buffer = self._buffers.get((file, key))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[file, key] = buffer
        return buffer


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


def _documents(
    progress: Progress,
    data_position: Any,
    config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    extra: Mapping[str, Any],
    world_size: int,
) -> dict[str, str]:
    """All texts of a checkpoint, final now: what the caller changes later must not reach the file."""
    state = {
        "progress": asdict(progress),
        "random": {"scheme": "step-keyed", "seed": config.get("seed")},
        "world_size": world_size,
        "versions": versions(),
        **extra,
    }
    return {
        STATE_FILE: json.dumps(state, indent=1),
        DATA_FILE: json.dumps(data_position),
        CONFIG_FILE: yaml.safe_dump(mask_secrets(dict(config)), sort_keys=False),
        MODEL_CONFIG_FILE: json.dumps(model_config, indent=1),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    try:
        own = metadata.version("clipyard")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"clipyard": own, "torch": str(torch.__version__), "python": platform.python_version()}


# ---- load


def verify_weights(source: str) -> None:
    """Compares the weights of a checkpoint folder with its manifest; another source has none to compare with.

    Raises CheckpointError when they differ.
    """
    path = Path(source)
    folder, weights = (path.parent, path.name) if path.name in (MODEL_FILE, EMA_FILE) else (path, MODEL_FILE)
    if (folder / MANIFEST).is_file():
        verify_checkpoint(folder, only=(weights, MODEL_CONFIG_FILE))


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's content. Tensors are mapped files: bytes are read when used, once per host for all its ranks."""

    folder: Path
    progress: Progress
    model: dict[str, Tensor]
    optimizer: OptimizerState
    data_position: Any
    state: dict[str, Any]
    config: dict[str, Any]
    model_config: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    lora: dict[str, Tensor] | None = None


def load_checkpoint(folder: Path) -> LoadedCheckpoint:
    """Read a checkpoint that was found whole before; only sizes are checked again. Raises CheckpointError."""
    verify_checkpoint(folder, checksums=False)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return LoadedCheckpoint(
            folder=folder,
            progress=Progress(**state["progress"]),
            model=load_file(folder / MODEL_FILE),
            optimizer=load_file(folder / OPTIMIZER_FILE),
            data_position=json.loads((folder / DATA_FILE).read_text(encoding="utf-8")),
            state=state,
            config=yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")),
            model_config=json.loads((folder / MODEL_CONFIG_FILE).read_text(encoding="utf-8")),
            ema=_load_if_there(folder / EMA_FILE),
            lora=_load_if_there(folder / LORA_FILE),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def _load_if_there(path: Path) -> dict[str, Tensor] | None:
    return load_file(path) if path.exists() else None


__all__ = [
    "CHECKPOINTS",
    "Checkpointer",
    "Fresh",
    "LoadedCheckpoint",
    "OptimizerState",
    "Pretrained",
    "Progress",
    "Resume",
    "StartState",
    "choose_start",
    "decide_start",
    "epoch_name",
    "load_checkpoint",
    "load_optimizer_tensors",
    "optimizer_to_tensors",
    "step_name",
    "verify_weights",
    "versions",
]
