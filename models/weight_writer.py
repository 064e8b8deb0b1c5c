"""Writes a safetensors file piece by piece, so that no model need be in memory for it. Knows no model.

The format: the length of the header in 8 bytes, the header as JSON (for each tensor its type, shape, and where its
bytes begin and end), and then the bytes of all tensors side by side.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPE_NAMES = {
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


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def in_file_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Wide types first: then every tensor lies on a multiple of its item size, as mapped reads want."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))


def write_safetensors(path: Path, specs: Mapping[str, TensorSpec], pieces: Iterable[Tensor]) -> None:
    """Writes tensors of these specs, in their order, and makes the file lasting (fsync).

    pieces: the tensors' values on the host, in the same order, cut anywhere. Raises OSError as the file system does.
    """
    left = sum(spec.num_bytes for spec in specs.values())
    with path.open("wb") as file:
        file.write(_header(specs))
        for piece in pieces:
            raw: Any = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(raw))
            left -= len(raw)
        assert left == 0, f"{path}: {left} bytes too few"
        file.flush()
        os.fsync(file.fileno())


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, spec in specs.items():
        begin, end = end, end + spec.num_bytes
        header[key] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
