"""What a checkpoint says of itself: its manifest, and by it and the folder's name which of two is newer.

Knows texts and names; of files only where a manifest lies. Who writes and verifies is `checkpoint_files`.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_NAME = re.compile(r"(epoch|step)_(\d+)")

AgeKey = tuple[float, float, int, int]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and CRC-32 of one file."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint consists of. `step` counts completed optimiser steps, `epoch` completed epochs.

    samples_seen: orders the checkpoints of a run whose global batch, and so the length of a step, has changed.
    """

    step: int
    epoch: int
    samples_seen: int = 0
    files: dict[str, FileEntry] = field(default_factory=dict)
    written_at: float = 0.0

    def to_text(self) -> str:
        """JSON with a checksum of itself, so that a damaged manifest cannot claim another step."""
        body = {"format": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**body, "manifest_crc32": _crc32_of_json(body)}, indent=1)

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Raises ValueError, KeyError or TypeError when the text is not a manifest or was altered."""
        body = json.loads(text)
        if body.pop("manifest_crc32") != _crc32_of_json(body):
            raise ValueError("its own checksum differs")
        if body.pop("format") != FORMAT_VERSION:
            raise ValueError("its format version is not known to this program")
        files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
        return cls(files=files, **body)


def _crc32_of_json(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def manifest_of(text: str, folder: str) -> Manifest:
    """The manifest that `text` is. Raises CheckpointError, naming `folder`, when it is none."""
    try:
        return Manifest.from_text(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged ({error})") from error


def parse_manifest(text: str | None) -> Manifest | None:
    """The manifest, if the text is one."""
    with contextlib.suppress(CheckpointError):
        return None if text is None else manifest_of(text, "")
    return None


def read_manifest_text(folder: Path) -> str | None:
    """What the folder's manifest says, whether or not that is one; None where it cannot be read."""
    try:
        return (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def is_checkpoint_name(name: str) -> bool:
    """True for the names that checkpoints have."""
    return _NAME.fullmatch(name) is not None


def age_key(name: str, manifest: Manifest | None) -> AgeKey:
    """Orders by samples and step; at the same one an epoch's folder is newer, being the one that is kept.

    Without a manifest that can be read it is the newest of all: what cannot be judged must be looked at.
    """
    match = _NAME.fullmatch(name)
    assert match is not None, name
    samples, step = (float("inf"),) * 2 if manifest is None else (manifest.samples_seen, manifest.step)
    return samples, step, int(match[1] == "epoch"), int(match[2])


def newest_first(manifests: Mapping[str, str | None]) -> list[tuple[AgeKey, str]]:
    """(age, name) of the checkpoints whose manifests can be read, newest first, by name and text."""
    parsed = ((name, parse_manifest(text)) for name, text in manifests.items())
    return sorted(((age_key(name, manifest), name) for name, manifest in parsed if manifest is not None), reverse=True)
