"""What weights say about themselves in the file beside them: how images were prepared, and with which tokenizer.

Our checkpoints have `model_config.json`, OpenCLIP's folders `open_clip_config.json`; single files say nothing. What
the weights were trained on wins over what a model's configuration would assume. Knows no tower.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.config import ModelConfig, PreprocessConfig
from models.decode import decode
from models.errors import CheckpointError, ConfigError
from models.tokenizer import Tokenizer

CONFIG_FILES = ("model_config.json", "open_clip_config.json")
# The image size is the model's, whose positions are resized to it.
_TRAVELS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
# Files that a folder's configuration is about, when they are named instead of the folder.
_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the ids that a text tower was trained on."""

    name: str
    fingerprint: str
    vocab_size: int
    pad_id: int
    eos_id: int | None
    context_length: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerIdentity:
        """That of `tokenizer`, whose files are read for it."""
        return cls(**{field.name: getattr(tokenizer, field.name) for field in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, stored: TokenizerIdentity) -> str | None:
        """A line about a tokenizer of equal ids but other rules than `stored`; None if they are the same.

        Raises ConfigError for another vocabulary, padding or end of text, by which the tower would read other words.
        """
        for key in ("vocab_size", "pad_id", "eos_id"):
            if getattr(self, key) != getattr(stored, key):
                raise ConfigError(
                    f"the tokenizer {self.name} has {key} {getattr(self, key)}, but the weights were trained with "
                    f"{stored.name}, whose {key} is {getattr(stored, key)}; --tokenizer names another"
                )
        if self.fingerprint == stored.fingerprint:
            return None
        return (
            f"the tokenizer {self.name} ({self.fingerprint}) is not the one that the weights were trained with, "
            f"{stored.name} ({stored.fingerprint}): some texts get other ids"
        )


@dataclass(frozen=True)
class Provenance:
    """What `file` says. preprocess: the settings that it gives, of those that travel."""

    file: str
    preprocess: Mapping[str, Any]
    tokenizer: TokenizerIdentity | None = None


def read_provenance(source: str) -> Provenance | None:
    """What is known of the weights at `source` (see `load_pretrained`); None where nothing is beside them.

    Raises CheckpointError for a file that cannot be read.
    """
    folder, _, name = source.rstrip("/").rpartition("/")
    if name not in _WEIGHTS:
        folder = source.rstrip("/")
    for file in CONFIG_FILES:
        path = f"{folder or '.'}/{file}"
        if (text := _read_text(path)) is not None:
            return parse_provenance(_parse(text, path), path)
    return None


def parse_provenance(raw: Mapping[str, Any], file: str) -> Provenance:
    """From the content of a checkpoint's configuration; `file` is for messages. Raises CheckpointError."""
    given = {key: value for key, value in (raw.get("preprocess_cfg") or {}).items() if key in _TRAVELS}
    try:
        preprocess = decode(PreprocessConfig, given, "preprocess_cfg")
        stored = raw.get("tokenizer")
        tokenizer = decode(TokenizerIdentity, stored, "tokenizer") if stored else None
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return Provenance(file, {key: getattr(preprocess, key) for key in given}, tokenizer)


def with_preprocess_of(config: ModelConfig, provenance: Provenance | None) -> ModelConfig:
    """`config` with the numbers by which images were prepared for the weights; the image size stays."""
    if provenance is None:
        return config
    return dataclasses.replace(config, preprocess=dataclasses.replace(config.preprocess, **provenance.preprocess))


def _read_text(path: str) -> str | None:
    """The content of a local file or an fsspec URL; None if there is none."""
    if "://" not in path:
        return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else None
    # Imported here, so that no client of any storage exists before it is needed.
    import fsspec

    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except Exception as error:  # every storage library has errors of its own
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _parse(text: str, path: str) -> Mapping[str, Any]:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid: {error}") from None
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} is not valid: it holds no settings")
    return raw
