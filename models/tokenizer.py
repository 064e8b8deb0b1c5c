"""OpenAI CLIP's tokenizer: text to token ids, exactly as OpenCLIP's, at a fraction of its cost.

Knows no model and needs no network: the vocabulary comes with the package `clip-anytorch`, whose code is
never imported. Words repeat, so the ids of each whitespace-separated word are remembered; and text that
the costly repairs cannot change skips them.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import html
import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ftfy
import ftfy.fixes
import numpy as np
import regex  # type: ignore[import-untyped]
import torch
from ftfy.badness import is_bad
from torch import Tensor

from models.config import TextConfig
from models.errors import ConfigError

if TYPE_CHECKING:
    from models.hf_tokenizer import HFTokenizer

_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# The file holds more merges than the model was trained with.
_NUM_MERGES = 48894
_SOT_ID = 512 + _NUM_MERGES
_EOT_ID = _SOT_ID + 1
# Ids as bytes, which Python joins, cuts and pads at the speed of C.
_PACKED = np.dtype("<u2")
_ID_BYTES = 2
_SPECIAL_IDS = {"<start_of_text>": _SOT_ID, "<end_of_text>": _EOT_ID}
_PIECES = regex.compile(
    "|".join(_SPECIAL_IDS) + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_RULES = "ftfy.fix_text, html.unescape twice, collapse whitespace, lower; " + _PIECES.pattern
# Control characters, line separators and surrogates, which ftfy treats in context.
_NEEDS_REPAIR = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NOT_PLAIN = re.compile(r"[^ -~]+")
# ftfy's sign of mojibake is a run of characters of these blocks; only the four at the end are suspicious alone.
_SUSPECT = r"[\x80-\u04ff\u2000-\u2fff\uf000-\uffff]"
# Two searches, and no counted repeat: the one pattern of both takes three times as long.
_SUSPECT_PAIR, _SUSPECT_SIGN = re.compile(_SUSPECT * 2), re.compile("[\u0152\u0153\xc2\xc3]")
# One changes the text, one sees that nothing is left; more than a few is ftfy's own business.
_MAX_ROUNDS = 4
# Enough for nearly all words of web captions at about 20 MB a process.
_MAX_REMEMBERED_WORDS = 65536
_MAX_REMEMBERED_LENGTH = 48


class Tokenizer(Protocol):
    """What a model's tokenizer is to everyone else: picklable, and cheap where it is not used."""

    context_length: int

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor: ...


class ClipTokenizer:
    """Texts to rows of token ids, padded with 0. Cheap to create and to pickle: tables load at first use.

    `vocab_size` and `eot_id` describe the ids, `fingerprint` identifies vocabulary and rules in a checkpoint.
    """

    name = "clip-bpe"
    vocab_size = _EOT_ID + 1
    eot_id = _EOT_ID
    sot_id = _SOT_ID
    eos_id = _EOT_ID
    pad_id = 0

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length
        self._remembered = _Words()
        self._ids_of = self._remembered.__getitem__

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two tokenizers if and only if they give every text the same ids (before truncation)."""
        return hashlib.sha256(f"{self.name} {_VOCABULARY_SHA256} {_RULES}".encode()).hexdigest()[:16]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """One text or several to int64 [N, context_length]: start, ids, end, zeros; cut to fit before the end token."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        # One conversion for all rows: each has a cost of its own.
        rows = b"".join([self._row(text, length) for text in texts])
        return torch.from_numpy(np.frombuffer(rows, dtype=_PACKED).reshape(-1, length).astype(np.int64))

    def encode(self, text: str) -> list[int]:
        """All ids of a text, without start, end or truncation."""
        return _unpacked(b"".join(map(self._ids_of, _words(text))))

    def __getstate__(self) -> dict[str, int]:
        return {"context_length": self.context_length}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _row(self, text: str, length: int) -> bytes:
        # Each word gives at least one id, so later words would be cut off anyway.
        ids = _SOT + b"".join(map(self._ids_of, _words(text)[:length]))
        return (ids[: (length - 1) * _ID_BYTES] + _EOT).ljust(length * _ID_BYTES, b"\0")


class _Words(dict[str, bytes]):
    """The ids of words, packed, made when first asked for and remembered as long as there is room."""

    def __missing__(self, word: str) -> bytes:
        # A comma or full stop behind a letter or digit is a piece of its own, and the word before it often known.
        if word[-1] in ",." and word[-2:-1].isalnum():
            ids = self[word[:-1]] + _packed(_piece_ids(word[-1]))
        else:
            ids = _packed(_encode_word(word))
        if len(word) <= _MAX_REMEMBERED_LENGTH and len(self) < _MAX_REMEMBERED_WORDS:
            self[word] = ids
        return ids


def _packed(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype=_PACKED).tobytes()


def _unpacked(ids: bytes) -> list[int]:
    return np.frombuffer(ids, dtype=_PACKED).tolist()


_SOT, _EOT = _packed([_SOT_ID]), _packed([_EOT_ID])


def build_tokenizer(config: TextConfig, context_length: int | None = None) -> ClipTokenizer | HFTokenizer:
    """The tokenizer of a text tower. Raises ConfigError where it is not on this machine, or does not fit the tower."""
    length = context_length or config.context_length
    tokenizer: ClipTokenizer | HFTokenizer
    if config.hf_tokenizer_name:
        # Imported here because it is an extra.
        from models.hf_tokenizer import HFTokenizer, hf_options

        options = hf_options(config.tokenizer_kwargs, config.tokenizer_mode)
        tokenizer = HFTokenizer(config.hf_tokenizer_name, length, options)
    else:
        for key in ("tokenizer_mode", "tokenizer_kwargs"):
            if getattr(config, key):
                raise ConfigError(f"text_cfg.{key} is for tokenizers of hf_tokenizer_name; CLIP's own has none")
        tokenizer = ClipTokenizer(length)
    _check_fits(tokenizer, config)
    return tokenizer


def _check_fits(tokenizer: Tokenizer, config: TextConfig) -> None:
    """Ids that the tower has no row for, or takes for something else, would train without a word."""
    name, vocab_size, pad_id = tokenizer.name, config.vocab_size, config.pad_id
    if config.hf_model_name:
        from models.hf_text import read_hf_config

        encoder: Any = read_hf_config(config)
        vocab_size, pad_id = encoder.vocab_size, encoder.pad_token_id
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"text_cfg.vocab_size {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} ({name})"
        )
    masks_padding = config.hf_model_name or config.embed_cls
    if masks_padding and tokenizer.pad_id != pad_id:
        raise ConfigError(f"the tokenizer {name} pads with {tokenizer.pad_id}, but the text tower masks {pad_id}")
    if config.hf_model_name:
        return
    if config.pool_type == "eos" and tokenizer.eos_id != config.eos_id:
        raise ConfigError(f"text_cfg.eos_id {config.eos_id}: the tokenizer {name} ends texts with {tokenizer.eos_id}")
    if config.pool_type == "argmax" and tokenizer.eos_id != tokenizer.vocab_size - 1:
        raise ConfigError(
            f"text_cfg.pool_type argmax pools the largest id, which is not the end of a text ({tokenizer.eos_id}) in "
            f"the tokenizer {name}: use eos with its eos_id, or last"
        )


def _words(text: str) -> list[str]:
    """Cleaned, lower-cased, split at whitespace, which no token crosses."""
    if "&" in text or not (text.isascii() and text.isprintable()):
        text = clean_text(text)
    return text.lower().split()


def clean_text(text: str) -> str:
    """ftfy's repairs, then HTML entities unescaped twice."""
    if _is_plain(text) and "&" not in text:
        return text
    text = _repair(text)
    return html.unescape(html.unescape(text)) if "&" in text else text


def _repair(text: str) -> str:
    """`ftfy.fix_text(text)`, by a shorter way where that is the same.

    ftfy repeats its steps until nothing changes. For one line without control characters that does not look
    like mojibake, these are: entities unless there is a tag, single characters, composition (NFC).
    """
    unescapes = "&" in text and "<" not in text
    repaired = text
    for _ in range(_MAX_ROUNDS):
        before = repaired
        if unescapes:
            repaired = ftfy.fixes.unescape_html(repaired)
        if not _is_plain(repaired):
            if _NEEDS_REPAIR.search(repaired) or (_may_be_bad(repaired) and is_bad(repaired)):
                break
            repaired = unicodedata.normalize("NFC", _NOT_PLAIN.sub(_fix_characters, repaired))
            # A character may have become the ampersand of an entity.
            unescapes = "&" in repaired and "<" not in text
        if repaired == before:
            return repaired
    return ftfy.fix_text(text)


def _may_be_bad(text: str) -> bool:
    return bool(_SUSPECT_PAIR.search(text) or _SUSPECT_SIGN.search(text))


def _fix_characters(run: re.Match[str]) -> str:
    return run[0].translate(_CHARACTER_FIXES)


def _is_plain(text: str) -> bool:
    """Printable ASCII, which no repair of single characters or encodings changes."""
    return text.isascii() and text.isprintable()


class _CharacterFixes(dict[int, str]):
    """What ftfy makes of a single character (ligatures, widths, quotes, invisible ones), computed when first met."""

    def __missing__(self, code: int) -> str:
        fixed = chr(code)
        for fix in (
            ftfy.fixes.fix_latin_ligatures,
            ftfy.fixes.fix_character_width,
            ftfy.fixes.uncurl_quotes,
            ftfy.fixes.remove_control_chars,
        ):
            fixed = fix(fixed)
        self[code] = fixed
        return fixed


_CHARACTER_FIXES = _CharacterFixes()


def _encode_word(word: str) -> tuple[int, ...]:
    ids: list[int] = []
    for piece in _PIECES.findall(word):
        # Most new words are old ones with another sign at their end.
        ids += _piece_ids(piece) if len(piece) <= _MAX_REMEMBERED_LENGTH else _tables().encode_piece(piece)
    return tuple(ids)


@lru_cache(maxsize=_MAX_REMEMBERED_WORDS)
def _piece_ids(piece: str) -> tuple[int, ...]:
    special = _SPECIAL_IDS.get(piece)
    return tuple(_tables().encode_piece(piece)) if special is None else (special,)


class _Tables:
    """Byte-pair encoding: `byte_ids` of single bytes, `merges` from (left, right) id to the id of both.

    Ids: 0 to 255 bytes, 256 to 511 bytes that end a piece, then one for each merge in the order learnt.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        order = _byte_order()
        self.byte_ids = [order.index(byte) for byte in range(256)]
        symbols = [_printable(byte, order) for byte in order]
        ids = {symbol: number for number, symbol in enumerate(symbols + [symbol + "</w>" for symbol in symbols])}
        self.merges: dict[tuple[int, int], int] = {}
        for line in lines:
            left, right = line.split()
            # A symbol is made before it is used, so a merge's id is above those of its parts.
            self.merges[ids[left], ids[right]] = ids[left + right] = len(ids)

    def encode_piece(self, piece: str) -> list[int]:
        """Merges the earliest learnt pair first, from left to right, until none is left. O(n log n)."""
        ids = [self.byte_ids[byte] for byte in piece.encode()]
        ids[-1] += 256
        after = list(range(1, len(ids) + 1))
        before = list(range(-1, len(ids) - 1))
        waiting = [(self.merges.get(pair, 0), at) for at, pair in enumerate(pairwise(ids))]
        waiting = [entry for entry in waiting if entry[0]]
        heapq.heapify(waiting)
        while waiting:
            merged, left = heapq.heappop(waiting)
            right = after[left]
            if right == len(ids) or self.merges.get((ids[left], ids[right])) != merged:
                continue  # one of the two has been merged with another since
            ids[left], ids[right] = merged, -1
            after[left] = after[right]
            if after[left] < len(ids):
                before[after[left]] = left
            for at in (before[left], left):
                if at >= 0 and after[at] < len(ids):
                    candidate = self.merges.get((ids[at], ids[after[at]]))
                    if candidate is not None:
                        heapq.heappush(waiting, (candidate, at))
        return [token for token in ids if token >= 0]


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    return _Tables(_merges())


def vocabulary() -> tuple[list[str], list[str]]:
    """The symbols in the order of their ids, without start and end, and the merges, as 'left right', in theirs."""
    merges, order = _merges(), _byte_order()
    single = [_printable(byte, order) for byte in order]
    return [*single, *(symbol + "</w>" for symbol in single), *(merge.replace(" ", "") for merge in merges)], merges


def _merges() -> list[str]:
    lines = gzip.decompress(_vocabulary_bytes()).decode("utf-8").split("\n")
    return lines[1 : 1 + _NUM_MERGES]


def _vocabulary_bytes() -> bytes:
    # Found without importing the package: its own start-up needs modules that are not always there.
    spec = importlib.util.find_spec("clip")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        path = Path(folder) / _VOCABULARY_FILE
        if path.is_file():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != _VOCABULARY_SHA256:
                raise ConfigError(f"{path} is not CLIP's vocabulary: reinstall clip-anytorch")
            return content
    raise ConfigError("CLIP's vocabulary is not installed: pip install clip-anytorch")


def _byte_order() -> list[int]:
    """The order in which the vocabulary lists the 256 bytes: the printable ones of Latin-1 first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


def _printable(byte: int, order: Sequence[int]) -> str:
    """The character that stands for a byte in the vocabulary file."""
    at = order.index(byte)
    num_printable = 188
    return chr(byte) if at < num_printable else chr(256 + at - num_printable)
