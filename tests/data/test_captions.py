from __future__ import annotations

import json

import pytest

from data.captions import caption_of
from data.samples import RawSample, SampleError


def sample(**fields: bytes) -> RawSample:
    return RawSample("k", "s.tar", 0, fields)


def reason_of(raw: RawSample, caption_key: str) -> str:
    with pytest.raises(SampleError) as caught:
        caption_of(raw, caption_key)
    return caught.value.reason


def test_the_text_member_is_the_caption_as_it_stands() -> None:
    assert caption_of(sample(txt="  Ein Hund läuft\n".encode()), "txt") == "  Ein Hund läuft\n"


def test_a_byte_order_mark_is_no_part_of_the_caption() -> None:
    assert caption_of(sample(txt=b"\xef\xbb\xbfa dog"), "txt") == "a dog"


def test_bytes_that_are_not_utf8_cost_a_character_and_not_the_sample() -> None:
    assert caption_of(sample(txt=b"caf\xe9 noir"), "txt") == "caf\ufffd noir"


def test_any_member_can_hold_the_caption() -> None:
    assert caption_of(sample(txt=b"a", caption=b"b"), "caption") == "b"


def test_a_field_of_the_json_is_the_caption() -> None:
    raw = sample(json=json.dumps({"TEXT": "a cat", "json": "odd", "n": 3}).encode(), txt=b"other")
    assert caption_of(raw, "json:TEXT") == "a cat"
    assert caption_of(raw, "json:json") == "odd"


@pytest.mark.parametrize(
    ("fields", "caption_key", "reason"),
    [
        ({"cls": b"3"}, "txt", "no_caption"),
        ({"txt": b""}, "txt", "empty_caption"),
        ({"txt": b" \n\t"}, "txt", "empty_caption"),
        ({"txt": b"a"}, "json:caption", "no_caption"),
        ({"json": b'{"caption": null}'}, "json:caption", "no_caption"),
        ({"json": b'{"caption": 3}'}, "json:caption", "no_caption"),
        ({"json": b'{"other": "a"}'}, "json:caption", "no_caption"),
        ({"json": b'["caption"]'}, "json:caption", "no_caption"),
        ({"json": b'{"caption": "  "}'}, "json:caption", "empty_caption"),
        ({"json": b'{"caption": "cut of'}, "json:caption", "broken_json"),
        ({"json": b"[" * 100_000}, "json:caption", "broken_json"),
        ({"json": b""}, "json:caption", "broken_json"),
    ],
)
def test_a_sample_without_a_caption_says_why(fields: dict[str, bytes], caption_key: str, reason: str) -> None:
    assert reason_of(sample(**fields), caption_key) == reason
