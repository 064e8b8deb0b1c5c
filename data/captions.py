"""The caption of a raw sample: a text member, or a field of its JSON. Knows no tokenizer."""

from __future__ import annotations

import json
from typing import Any

from data.samples import RawSample, SampleError

_JSON_PREFIX = "json:"


def caption_of(raw: RawSample, caption_key: str) -> str:
    """The text under `caption_key`: a member's extension ("txt"), or "json:FIELD" for a field of the `json` member.

    Bytes that are not UTF-8 become U+FFFD: one odd character costs less than the pair. Raises SampleError:
    "no_caption" when member or field is missing or not a text, "broken_json", "empty_caption".
    """
    text = (
        _json_field(raw, caption_key.removeprefix(_JSON_PREFIX)) if _in_json(caption_key) else _member(raw, caption_key)
    )
    if not text.strip():
        raise SampleError("empty_caption")
    return text


def _in_json(caption_key: str) -> bool:
    return caption_key.startswith(_JSON_PREFIX)


def _member(raw: RawSample, extension: str) -> str:
    if extension not in raw.fields:
        raise SampleError("no_caption", f"no member {extension!r}")
    return raw.fields[extension].decode("utf-8-sig", errors="replace")


def _json_field(raw: RawSample, name: str) -> str:
    record = _parse(_member(raw, "json"))
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise SampleError("no_caption", f"no text under {name!r} in the json")
    return value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("broken_json", str(error)) from error
