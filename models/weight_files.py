"""Reads a state dict from wherever weights are kept, without ever running what a file contains.

Takes a checkpoint folder, a safetensors file, or a PyTorch file, from disk or any fsspec URL, and returns
tensors under the names a bare model has. Knows no model.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import CheckpointError

# In a checkpoint folder of ours or transformers', and in a repository of OpenCLIP's form.
_FOLDER_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# PyTorch's files from before it wrote archives begin with this number, pickled.
_OLD_PYTORCH_HEAD = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_PICKLE_PROTOCOL = pickle.PROTO[0]
_COPY_BYTES = 16 * 1024 * 1024
_NPZ_ADVICE = "load it with OpenCLIP, and save the model's state dict as .safetensors"


def read_weights(source: str) -> dict[str, Tensor]:
    """The state dict in `source`, under OpenCLIP's names, wrapper prefixes stripped, on the CPU.

    Tensors may be views of the mapped file. Raises CheckpointError naming what is wrong with the source.
    """
    return read_weights_and_notes(source)[0]


def read_weights_and_notes(source: str) -> tuple[dict[str, Tensor], list[str]]:
    """`read_weights`, and a line for each kind of wrapper that was taken off."""
    with _local_file(source) as path:
        loaded = _load(path, source)
    return _strip_wrappers(_extract(loaded, source))


def is_mapped(source: str) -> bool:
    """Whether reading `source` takes no memory before its tensors are used: a local file of any but the old format."""
    if "://" in source:
        return False
    with _file_in(Path(source)).open("rb") as file:
        return not file.read(len(_OLD_PYTORCH_HEAD)).startswith(_OLD_PYTORCH_HEAD)


def read_beside(source: str, name: str) -> str | None:
    """The text of the file `name` in the folder of `source`, None where there is none that can be read."""
    folder = source.rpartition("/")[0] or "." if source.endswith(_FILE_SUFFIXES) else source.rstrip("/")
    if "://" not in folder:
        path = Path(folder) / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    with tempfile.TemporaryDirectory(prefix="weights-") as temporary, suppress(CheckpointError):
        _download(f"{folder}/{name}", Path(temporary) / name)
        return (Path(temporary) / name).read_text(encoding="utf-8", errors="replace")
    return None


@contextmanager
def _local_file(source: str) -> Iterator[Path]:
    """A local path with the content of `source`; a downloaded copy is gone afterwards, its mapping stays valid."""
    if "://" not in source:
        yield _file_in(Path(source))
        return
    url = source if source.endswith(_FILE_SUFFIXES) else f"{source.rstrip('/')}/{_FOLDER_FILES[0]}"
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        path = Path(folder) / "weights"
        _download(url, path)
        yield path


def _file_in(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise CheckpointError(f"folder {path} has no {_FOLDER_FILES[0]}; it holds {held}")


def _download(url: str, path: Path) -> None:
    # Imported here, so that no client of any storage exists before it is needed.
    import fsspec

    try:
        with fsspec.open(url, "rb") as remote, path.open("wb") as local:
            shutil.copyfileobj(remote, local, _COPY_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{url}: no such object") from None
    except Exception as error:  # every storage library has errors of its own
        raise CheckpointError(f"{url} cannot be read: {_one_line(error)}") from error


def _load(path: Path, source: str) -> Any:
    if path.name.endswith(".index.json"):
        return _load_parts(path, source)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{source}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{source} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    if head[8:9] == b"{":
        return _load_safetensors(path, source, size)
    if path.suffix == ".safetensors":
        # torch.load would read it by its name, and say of it what it says of a damaged one.
        raise CheckpointError(f"{source} is refused: {path.name} is no safetensors file (it begins with {head[:8]!r})")
    if source.endswith(".npz"):
        raise CheckpointError(f"{source} is a NumPy archive (big_vision's form), which is not read: {_NPZ_ADVICE}")
    is_zip = head.startswith(b"PK\x03\x04")
    if is_zip or head.startswith(_OLD_PYTORCH_HEAD):
        return _load_pytorch(path, source, size, mmap=is_zip)
    if head[0] == _PICKLE_PROTOCOL:
        raise CheckpointError(f"{source} is refused: a plain pickle can run code, and weights need none")
    raise CheckpointError(f"{source} is neither a safetensors nor a PyTorch file (it begins with {head[:8]!r})")


def _load_safetensors(path: Path, source: str, size: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(_broken(source, size, error)) from None


def _load_parts(index: Path, source: str) -> dict[str, Tensor]:
    """A model in several safetensors files, as transformers stores large ones."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_broken(f"{source}: {index.name}", index.stat().st_size, error)) from None
    state: dict[str, Tensor] = {}
    for name in names:
        part = index.parent / Path(name).name
        if not part.is_file():
            raise CheckpointError(f"{source}: {part.name} is missing, {index.name} names it")
        state |= _load_safetensors(part, f"{source}: {part.name}", part.stat().st_size)
    return state


def _load_pytorch(path: Path, source: str, size: int, mmap: bool) -> Any:
    try:
        with _numpy_numbers_allowed():
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise nearly anything
        message = str(error) or type(error).__name__
    else:
        if mmap:
            _check_records(path, source)
        return loaded
    if "TorchScript" in message:
        raise CheckpointError(f"{source} is a TorchScript archive, which is a program: save its state dict instead")
    refused = re.search(r"(?:GLOBAL|global:?|class:?) ([\w.]+\.[\w.]+)", message)
    if refused:
        raise CheckpointError(f"{source} is refused: reading it would run code ({refused[1]}), and weights need none")
    # torch wraps the cause in advice to load the file unsafely.
    raise CheckpointError(_broken(source, size, message.rsplit("WeightsUnpickler error:", 1)[-1]))


def _check_records(path: Path, source: str) -> None:
    """PyTorch's archives hold a checksum of each record, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise CheckpointError(_broken(source, path.stat().st_size, error)) from None
    if damaged is not None:
        raise CheckpointError(f"{source} is corrupt: its record {damaged} differs from the checksum stored with it")


def _numpy_numbers_allowed() -> AbstractContextManager[None]:
    """Lets plain numbers of numpy through: OpenCLIP's trainer stores its learning rates as such."""
    rebuild: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "bool")]
    old_and_new_name = [(rebuild, "numpy.core.multiarray.scalar"), (rebuild, "numpy._core.multiarray.scalar")]
    return torch.serialization.safe_globals([*old_and_new_name, np.dtype, *kinds])


def _extract(loaded: Any, source: str) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{source} holds a {type(loaded).__name__}, not a state dict")
    state = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{source} holds no weights; its keys are {', '.join(map(str, list(loaded)[:5]))}")
    return state


def _strip_wrappers(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Takes off what DDP and torch.compile put before a module's own name."""
    notes = []
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
        notes.append("stripped module.")
    if any("_orig_mod." in key for key in state):
        state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
        notes.append("stripped _orig_mod.")
        inner, more = _strip_wrappers(state)
        return inner, notes + more
    return state, notes


def _broken(source: str, size: int, error: object) -> str:
    return f"{source} is truncated or corrupt ({size} bytes): {_one_line(error)}"


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    name = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    return name + (text if len(text) <= 200 else text[:200] + "...")
