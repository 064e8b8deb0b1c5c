"""The caption of a raw sample: a text member, or a field of its JSON; one of several where a run names several.

Knows no tokenizer. Which caption a sample gets follows from its own random key alone, whoever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from data.errors import DataConfigError
from data.samples import RawSample, SampleError, record_of

_JSON_PREFIX = "json:"

RandomKey = tuple[int | str, ...]


@dataclass(frozen=True)
class CaptionConfig:
    """`--caption-key` and `--caption-probs`: where captions are, and how often each key is drawn.

    keys: as `caption_of` reads them. probs: one positive weight for each key, not necessarily of sum 1; none
    means equal ones. DataConfigError for what does not fit together.
    """

    keys: tuple[str, ...] = ("txt",)
    probs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for problem in _problems(self.keys, self.probs):
            raise DataConfigError(problem)

    @property
    def names(self) -> str:
        """The keys for a message."""
        return ", ".join(map(repr, self.keys))

    @property
    def json_fields(self) -> tuple[str, ...]:
        """The fields of the JSON record that hold captions."""
        return tuple(key.removeprefix(_JSON_PREFIX) for key in self.keys if _in_json(key))

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that hold captions, `json` among them if a field of it does."""
        members = tuple(key for key in self.keys if not _in_json(key))
        return (*members, "json") if self.json_fields else members

    def draw(self, random_key: RandomKey) -> str:
        """The key for the sample of `random_key`."""
        if len(self.keys) == 1:
            return self.keys[0]
        from data.randomness import KeyedRandom  # brings numpy, which the command line does without

        ends = list(accumulate(self._weights()))
        point = KeyedRandom("caption", *random_key).uniform(0, ends[-1])
        return next((key for key, end in zip(self.keys, ends, strict=True) if point < end), self.keys[-1])

    def by_weight(self) -> list[str]:
        """The keys, those that are drawn most often first; equal ones as they are listed."""
        weights = dict(zip(self.keys, self._weights(), strict=True))
        return sorted(self.keys, key=lambda key: -weights[key])

    def _weights(self) -> tuple[float, ...]:
        return self.probs or (1.0,) * len(self.keys)


def draw_caption(raw: RawSample, config: CaptionConfig, random_key: RandomKey) -> str:
    """The caption under the key that is drawn; without one there, that of the next key by weight.

    Where all keys fail, raises the SampleError of the one that was drawn (see `caption_of`).
    """
    first = config.draw(random_key)
    try:
        return caption_of(raw, first, random_key)
    except SampleError:
        for key in config.by_weight():
            if key != first and (text := _caption_or_none(raw, key, random_key)) is not None:
                return text
        raise


def caption_of(raw: RawSample, caption_key: str, random_key: RandomKey | None = None) -> str:
    """The text under `caption_key`: a member's extension ("txt"), or "json:FIELD" for a field of the `json` member.

    "json:a.b" is the field "a.b", else the field "b" inside of "a". Of a field that is a list of texts one is
    drawn, or the first taken where there is no `random_key`. Bytes that are not UTF-8 become U+FFFD: one odd
    character costs less than the pair. Raises SampleError: "no_caption" when member or field is missing or not a
    text, "broken_json", "empty_caption".
    """
    if _in_json(caption_key):
        text = _json_field(raw, caption_key.removeprefix(_JSON_PREFIX), random_key)
    else:
        text = _member(raw, caption_key)
    if not text.strip():
        raise SampleError("empty_caption", f"under {caption_key!r}")
    return text


def _caption_or_none(raw: RawSample, caption_key: str, random_key: RandomKey) -> str | None:
    try:
        return caption_of(raw, caption_key, random_key)
    except SampleError:
        return None


def _problems(keys: tuple[str, ...], probs: tuple[float, ...]) -> Iterator[str]:
    if not keys:
        yield "--caption-key names no key"
    for key in keys:
        if not key.removeprefix(_JSON_PREFIX).strip():
            yield f"--caption-key {key!r} is empty: txt, another member's extension, or json:FIELD"
        if key == "json":
            yield "--caption-key json is the whole record: name a field of it as json:FIELD"
        if keys.count(key) > 1:
            yield f"--caption-key names {key!r} twice"
    if probs and len(probs) != len(keys):
        yield f"--caption-probs has {len(probs)} values for the {len(keys)} keys of --caption-key"
    for prob in probs:
        if not 0 < prob < math.inf:
            yield f"--caption-probs must be positive, got {prob:g}; leave out a key that is never wanted"


def _in_json(caption_key: str) -> bool:
    return caption_key.startswith(_JSON_PREFIX)


def _member(raw: RawSample, extension: str) -> str:
    if extension not in raw.fields:
        raise SampleError("no_caption", f"no member {extension!r}")
    return raw.fields[extension].decode("utf-8-sig", errors="replace")


def _json_field(raw: RawSample, name: str, random_key: RandomKey | None) -> str:
    if raw.record is None and "json" not in raw.fields:
        raise SampleError("no_caption", "no member 'json'")
    value = _inside(record_of(raw), name)
    if isinstance(value, list):
        value = _one_of(value, random_key)
    if not isinstance(value, str):
        raise SampleError("no_caption", f"no text under {name!r} in the json")
    return value


def _inside(record: Any, name: str) -> Any:
    """The field `name`, or for a name with dots a field of a field; None where there is none."""
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    return _inside(record.get(head), rest) if dot else None


def _one_of(values: Iterable[Any], random_key: RandomKey | None) -> str | None:
    """One of the texts that say something; an empty one where all are empty, None where there is no text."""
    texts = [value for value in values if isinstance(value, str)]
    texts = [text for text in texts if text.strip()] or texts[:1]
    if len(texts) < 2 or random_key is None:
        return texts[0] if texts else None
    from data.randomness import KeyedRandom

    return texts[int(KeyedRandom("caption text", *random_key).uniform(0, len(texts)))]
