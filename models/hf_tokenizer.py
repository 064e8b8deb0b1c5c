"""Tokenizers of Hugging Face's libraries as OpenCLIP uses them: cleaning, modes, and one row of ids a text.

SigLIP, CLIPA, MetaCLIP worldwide and all towers of transformers read through these. A tokenizer comes from a folder or
the hub's cache; nothing is downloaded. Knows no tower.
"""

from __future__ import annotations

import hashlib
import json
import os
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from models.errors import ConfigError
from models.hf_files import local_folder, transformers
from models.tokenizer import clean_text

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
# Enough kinds of text to tell tokenizers of the same vocabulary apart: case, digits, scripts, spaces, accents.
_PROBES = (
    "a photo of a cat",
    "A Photo, of   TWO cats & 1,234.5 dogs!",
    "l'été à Zürich, ﬁn; I'd've said it's unbelievably antidisestablishmentarian",
    "日本語のテキスト 한국어 العربية हिन्दी ไทย русский",
    "😀👩‍👩‍👧‍👦 \t\n <s> </s> [SEP] <pad>",
)


@dataclass(frozen=True)
class HFTokenizerOptions:
    """What the model decides about its tokenizer; names and defaults are OpenCLIP's `tokenizer_kwargs`.

    mode: None, or "clips": start, at most L-3 ids, end, padding, and the class token last. `language` is for
    tokenizers that begin a row with one.
    """

    clean: str = "whitespace"
    strip_sep_token: bool = False
    language: str | None = None
    mode: str | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clean not in CLEANERS:
            raise ConfigError(f"text_cfg.tokenizer_kwargs.clean: {self.clean!r} is none of {', '.join(CLEANERS)}")
        if self.mode not in (None, "", "clips"):
            raise ConfigError(f"text_cfg.tokenizer_mode: {self.mode!r} is not supported; clips is")


class HFTokenizer:
    """Texts to rows of token ids. Cheap to create and to pickle: files are read at first use, in each process.

    source: a folder, or a name on the hub whose files are in its cache.
    """

    def __init__(self, source: str, context_length: int, options: HFTokenizerOptions | None = None) -> None:
        self.name = source
        self.context_length = context_length
        self.options = options or HFTokenizerOptions()
        self._clean = CLEANERS[self.options.clean]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """One text or several to int64 [N, context_length], cut and padded as the tokenizer does."""
        cleaned = [self._clean(text) for text in ([texts] if isinstance(texts, str) else texts)]
        length = context_length or self.context_length
        if self.options.mode == "clips":
            return torch.tensor([self._clips_row(text, length) for text in cleaned], dtype=torch.int64)
        rows = self._library(cleaned, max_length=length, padding="max_length", truncation=True)
        tokens = torch.tensor(rows["input_ids"], dtype=torch.int64).view(len(cleaned), length)
        return tokens.masked_fill(tokens == self._library.sep_token_id, 0) if self.options.strip_sep_token else tokens

    def encode(self, text: str) -> list[int]:
        """All ids of a text, without start, end or truncation."""
        return self._library(self._clean(text), add_special_tokens=False, truncation=False)["input_ids"]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._library.get_vocab().values()) + 1

    @property
    def pad_id(self) -> int:
        return self._library.pad_token_id

    @property
    def eos_id(self) -> int | None:
        return self._library.eos_token_id

    @cached_property
    def fingerprint(self) -> str:
        """Differs for tokenizers of other vocabularies, rules of cleaning, or ids for a few hard texts.

        Made of what a tokenizer does rather than of its files, which differ between versions of the libraries.
        """
        vocabulary = sorted(self._library.get_vocab().items())
        ids = [self([probe], 64).tolist() for probe in _PROBES]
        content = json.dumps([vocabulary, ids, self.pad_id, self.eos_id, self.options.clean])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.name, "context_length": self.context_length, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @cached_property
    def _library(self) -> Any:
        library = _read(self.name, self.options.language, json.dumps(self.options.others))
        self._check(library)
        return library

    def _check(self, library: Any) -> None:
        """Raises ConfigError where the tokenizer lacks what the options need of it."""
        needed = ["pad_token"]
        needed += ["sep_token"] * self.options.strip_sep_token
        needed += ["bos_token", "eos_token", "cls_token"] * (self.options.mode == "clips")
        if missing := [token for token in needed if getattr(library, token) is None]:
            raise ConfigError(f"text_cfg.hf_tokenizer_name: the tokenizer {self.name} has no {', '.join(missing)}")

    def _clips_row(self, text: str, length: int) -> list[int]:
        library = self._library
        ids = library(text, add_special_tokens=False, truncation=False)["input_ids"][: length - 3]
        row = [library.bos_token_id, *ids, library.eos_token_id]
        return row + [library.pad_token_id] * (length - 1 - len(row)) + [library.cls_token_id]


@lru_cache(maxsize=4)
def _read(name: str, language: str | None, others: str) -> Any:
    """The library's tokenizer, once a process: some take seconds. `others`: its keyword arguments, as JSON."""
    # Workers are the parallelism; threads of a tokenizer that was used before a fork would hang in it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = local_folder(name, "text_cfg.hf_tokenizer_name")
    try:
        library = transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, **json.loads(others))
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"text_cfg.hf_tokenizer_name: no tokenizer can be read from {folder}: {reason}") from None
    if language is not None:
        if not hasattr(library, "set_src_lang_special_tokens"):
            raise ConfigError(f"text_cfg.tokenizer_kwargs.language: the tokenizer {name} knows no languages")
        library.set_src_lang_special_tokens(language)
    return library


def hf_options(kwargs: dict[str, Any] | None, mode: str | None) -> HFTokenizerOptions:
    """From a model's `tokenizer_kwargs` and `tokenizer_mode`; what is not ours is for the library."""
    given = dict(kwargs or {})
    own = {key: given.pop(key) for key in ("clean", "strip_sep_token", "language") if key in given}
    return HFTokenizerOptions(mode=mode, others=given, **own)


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _whitespace(text: str) -> str:
    return _collapsed(clean_text(text))


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonical(text: str) -> str:
    """Without ASCII punctuation, underscores as spaces, in lower case: what SigLIP's captions were trained as."""
    return _collapsed(clean_text(text).translate(_NO_PUNCTUATION).lower())


CLEANERS: dict[str, Callable[[str], str]] = {
    "whitespace": _whitespace,
    "lower": _lower,
    "canonicalize": _canonical,
}
