"""The checkpoint folder as files: write, verify, find. Knows no model, no optimiser, no ranks.

A folder is built under a temporary name, its manifest is written last, and one rename makes it a
checkpoint: whatever kills the writer, a reader finds the old state or the new one. A replaced or
deleted folder loses its name first, for the same reason.

Names in the directory of checkpoints: `epoch_<N>` and `step_<NNNNNNNNN>` are checkpoints when their
manifest verifies. `.tmp-*` is being written, `.replaced-*` gives way to a new folder of its name,
`.deleted-*` is being deleted; each ends with the host and process id of its owner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import CheckpointError, CheckpointWriteError
from training.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    age_key,
    is_checkpoint_name,
    manifest_of,
    parse_manifest,
    read_manifest_text,
)

CHUNK_BYTES = 16 << 20
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# ---- write


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    *,
    step: int,
    epoch: int,
    samples_seen: int = 0,
) -> Manifest:
    """Write `folder` so that it appears whole or not at all; an existing folder of that name is replaced.

    tensors: file name -> (key -> tensor on the host), each file in the safetensors format.
    documents: file name -> text, or anything JSON can hold.
    Raises CheckpointWriteError when the file system refuses; what was there before is then untouched.
    """
    temporary = hidden_name("tmp", folder)
    try:
        remove_tree(temporary)
        temporary.mkdir(parents=True)
        manifest = _fill(temporary, tensors, documents, Manifest(step, epoch, samples_seen))
        _take_name(temporary, folder)
    except OSError as error:
        remove_tree(temporary)
        raise CheckpointWriteError(_describe_failure(folder, tensors, error)) from error
    return manifest


def _fill(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    manifest: Manifest,
) -> Manifest:
    files = {name: _write_file(folder / name, _text_pieces(content)) for name, content in documents.items()}
    files |= {name: _write_file(folder / name, _safetensors_pieces(content)) for name, content in tensors.items()}
    manifest = dataclasses.replace(manifest, files=files, written_at=time.time())
    # Order matters: the manifest vouches for the other files, so it is written when they are on the disk.
    _write_file(folder / MANIFEST, [manifest.to_text().encode()])
    _sync_folder(folder)
    return manifest


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """Write and fsync. The checksum is computed while the disk works: it costs no time of its own there."""
    chunks = [piece[at : at + CHUNK_BYTES] for piece in pieces for at in range(0, len(piece), CHUNK_BYTES)]
    with ThreadPoolExecutor(1) as pool, path.open("wb", buffering=1 << 20) as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        on_disk = pool.submit(os.fsync, file.fileno())
        checksum = 0
        for chunk in chunks:
            checksum = zlib.crc32(chunk, checksum)
        on_disk.result()
    return FileEntry(size=sum(len(chunk) for chunk in chunks), crc32=checksum)


def _text_pieces(content: Any) -> list[bytes]:
    return [content.encode() if isinstance(content, str) else json.dumps(content).encode()]


def _safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: header length, JSON header, raw tensors; nothing is copied.

    Wide types come first so that every tensor lies on a multiple of its item size, as mapped reads want.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        raw: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield memoryview(raw)


def _take_name(temporary: Path, folder: Path) -> None:
    """Rename the finished folder to its name; one that has the name already steps aside first."""
    replaced = hidden_name("replaced", folder)
    if folder.exists():
        remove_tree(replaced)
        folder.rename(replaced)
    temporary.rename(folder)
    _sync_folder(folder.parent)
    remove_tree(replaced)


def receive(
    folder: Path, source: str, manifest_text: str, get: Callable[[str, Path], None], only: Collection[str] = ()
) -> Path:
    """Build `folder` from `source`, of which `get(name, path)` brings a file. It appears verified, or not at all.

    only: bring these files alone; the folder is no whole checkpoint then.
    Raises CheckpointError when what came is not what the manifest says, and whatever `get` raises.
    """
    temporary = hidden_name("tmp", folder)
    manifest = manifest_of(manifest_text, source)
    try:
        remove_tree(temporary)
        temporary.mkdir(parents=True)
        with ThreadPoolExecutor(4) as pool:
            wanted = [name for name in manifest.files if not only or name in only]
            list(pool.map(lambda name: get(name, temporary / name), wanted))
        (temporary / MANIFEST).write_text(manifest_text, encoding="utf-8")
        verify_checkpoint(temporary, only=only)
        _take_name(temporary, folder)
    except CheckpointError as error:
        raise type(error)(str(error).replace(str(temporary), source)) from error
    except OSError as error:
        raise CheckpointWriteError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        remove_tree(temporary)
    return folder


def hidden_name(kind: str, folder: Path) -> Path:
    """Beside `folder`, a name that no reader takes for a checkpoint: kind, its name, and this process as the owner."""
    return folder.with_name(f".{kind}-{folder.name}-{socket.gethostname()}-{os.getpid()}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of folders; their renames are durable in their own way.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Deletes as much of `folder` as can be deleted, if there is any."""
    shutil.rmtree(folder, ignore_errors=True)


def _describe_failure(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], error: OSError) -> str:
    message = f"cannot write checkpoint {folder}: {error.strerror or error}"
    with contextlib.suppress(OSError):
        needed = sum(t.numel() * t.element_size() for file in tensors.values() for t in file.values())
        free = shutil.disk_usage(folder.parent).free
        message += f" ({needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free)"
    return message + "; earlier checkpoints are untouched"


# ---- verify and find


def verify_checkpoint(folder: Path, *, checksums: bool = True, only: Collection[str] = ()) -> Manifest:
    """The manifest of a whole checkpoint. Reads every byte unless `checksums` is false (then sizes only).

    only: look at these files alone, and say of these alone what the manifest says. Raises CheckpointError that says
    what is wrong.
    """
    manifest = _read_manifest(folder)
    if only:
        files = {name: entry for name, entry in manifest.files.items() if name in only}
        manifest = dataclasses.replace(manifest, files=files)
    for name, entry in manifest.files.items():
        size = _size_of(folder / name)
        if size != entry.size:
            raise CheckpointError(f"{folder}: {name} has {size} bytes, its manifest says {entry.size}")
    if checksums:
        with ThreadPoolExecutor(4) as pool:
            sums = list(pool.map(lambda name: _crc32_of_file(folder / name), manifest.files))
        for (name, entry), found in zip(manifest.files.items(), sums, strict=True):
            if found != entry.crc32:
                raise CheckpointError(f"{folder}: {name} is damaged (its checksum differs from the manifest)")
    return manifest


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint folder")
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a whole checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged ({error})") from error
    return manifest_of(text, str(folder))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read ({error.strerror})") from error


def _crc32_of_file(path: Path) -> int:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    checksum = 0
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                checksum = zlib.crc32(buffer[:count], checksum)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read ({error.strerror})") from error
    return checksum


def list_checkpoints(directory: Path) -> list[Path]:
    """All folders with a checkpoint's name, newest first; those without a readable manifest lead the list."""
    if not directory.is_dir():
        return []
    folders = [path for path in directory.iterdir() if is_checkpoint_name(path.name) and path.is_dir()]
    return sorted(
        folders, key=lambda folder: age_key(folder.name, parse_manifest(read_manifest_text(folder))), reverse=True
    )


def find_latest(directory: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """(newest checkpoint that verifies or None, [(newer folder, why it was passed over)])."""
    passed_over: list[tuple[Path, str]] = []
    for folder in list_checkpoints(directory):
        try:
            verify_checkpoint(folder)
            return folder, passed_over
        except CheckpointError as error:
            passed_over.append((folder, str(error)))
    return None, passed_over
