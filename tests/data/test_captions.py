from __future__ import annotations

import json
from collections import Counter

import pytest

from data import randomness
from data.captions import CaptionConfig, caption_of, draw_caption
from data.errors import DataConfigError
from data.randomness import KeyedRandom
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


def json_sample(record: object, **fields: bytes) -> RawSample:
    return sample(json=json.dumps(record).encode(), **fields)


def test_a_name_with_dots_is_a_field_of_that_name_or_one_inside_another() -> None:
    assert caption_of(json_sample({"a.b": "flat", "a": {"b": "deep"}}), "json:a.b") == "flat"
    assert caption_of(json_sample({"a": {"b": "deep", "b.c": "mixed"}}), "json:a.b") == "deep"
    assert caption_of(json_sample({"a": {"b.c": "mixed"}}), "json:a.b.c") == "mixed"
    assert reason_of(json_sample({"a": "text"}), "json:a.b") == "no_caption"


def test_of_a_list_of_texts_one_is_drawn_and_evaluation_takes_the_first() -> None:
    raw = json_sample({"alts": ["", "one", 3, "two", " "]})
    assert caption_of(raw, "json:alts") == "one"
    assert {caption_of(raw, "json:alts", (n,)) for n in range(30)} == {"one", "two"}
    assert reason_of(json_sample({"alts": []}), "json:alts") == "no_caption"
    assert reason_of(json_sample({"alts": [3]}), "json:alts") == "no_caption"
    assert reason_of(json_sample({"alts": ["", " "]}), "json:alts") == "empty_caption"


@pytest.mark.parametrize(("probs", "share"), [((), 1 / 3), ((1.0, 1.0, 1.0), 1 / 3), ((0.6, 0.2, 0.2), 0.2)])
def test_keys_are_drawn_as_often_as_asked(probs: tuple[float, ...], share: float) -> None:
    config = CaptionConfig(("txt", "json:alt", "cap"), probs)
    raw = json_sample({"alt": "alt"}, txt=b"txt", cap=b"cap")
    counts = Counter(draw_caption(raw, config, (7, n)) for n in range(3000))
    assert counts["alt"] == pytest.approx(3000 * share, rel=0.1)
    assert counts["cap"] == pytest.approx(3000 * share, rel=0.1)


def test_the_draw_follows_the_sample_alone_and_is_not_the_crops() -> None:
    config = CaptionConfig(("txt", "cap"))
    raw = sample(txt=b"txt", cap=b"cap")
    drawn = [draw_caption(raw, config, (0, n)) for n in range(50)]
    assert [draw_caption(raw, config, (0, n)) for n in reversed(range(50))] == drawn[::-1]
    crops = [KeyedRandom("prepare", 0, n).uniform() < 0.5 for n in range(50)]
    assert [caption == "txt" for caption in drawn] != crops


def test_what_the_drawn_key_lacks_comes_from_the_likeliest_other() -> None:
    config = CaptionConfig(("a", "b", "c"), (0.1, 0.3, 0.6))
    assert {draw_caption(sample(a=b"a", b=b"b"), config, (n,)) for n in range(100)} == {"a", "b"}
    only_b_is_drawn = [n for n in range(100) if config.draw((n,)) == "c"]
    assert {draw_caption(sample(a=b"a", b=b"b", c=b" "), config, (n,)) for n in only_b_is_drawn} == {"b"}
    equal = CaptionConfig(("a", "b", "c"))
    assert {draw_caption(sample(b=b"b", c=b"c"), equal, (n,)) for n in range(50) if equal.draw((n,)) == "a"} == {"b"}


def test_a_sample_without_any_caption_is_refused_for_the_reason_of_the_drawn_key() -> None:
    config = CaptionConfig(("txt", "json:alt"), (1, 1e-9))
    with pytest.raises(SampleError, match="empty_caption"):
        draw_caption(sample(txt=b" "), config, (0,))
    broken = sample(txt=b"good", json=b"{broken")
    assert draw_caption(broken, CaptionConfig(("json:a", "txt"), (1, 1e-9)), (0,)) == "good"


def test_the_record_is_parsed_once_for_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    parse = json.loads
    monkeypatch.setattr(json, "loads", lambda text: calls.append(text) or parse(text))
    raw = sample(json=b'{"c": "text"}')
    assert draw_caption(raw, CaptionConfig(("json:a", "json:b", "json:c")), (1,)) == "text"
    assert len(calls) == 1


def test_one_key_costs_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "KeyedRandom", lambda *key: pytest.fail("a draw"))
    assert draw_caption(sample(txt=b"a"), CaptionConfig(), (0,)) == "a"
    assert draw_caption(json_sample({"a": ["one"]}), CaptionConfig(("json:a",)), (0,)) == "one"


@pytest.mark.parametrize(
    ("keys", "probs", "message"),
    [
        ((), (), "names no key"),
        (("",), (), "'' is empty"),
        (("txt", "json:"), (), "'json:' is empty"),
        (("json",), (), "json:FIELD"),
        (("txt", "a", "txt"), (), "'txt' twice"),
        (("txt", "a"), (0.5,), "1 values for the 2 keys"),
        (("txt",), (0.5, 0.5), "2 values for the 1 keys"),
        (("txt", "a"), (1.0, 0.0), "must be positive, got 0"),
        (("txt", "a"), (1.0, float("nan")), "must be positive, got nan"),
        (("txt", "a"), (1.0, float("inf")), "must be positive, got inf"),
    ],
)
def test_keys_and_probabilities_that_do_not_fit_are_refused(
    keys: tuple[str, ...], probs: tuple[float, ...], message: str
) -> None:
    with pytest.raises(DataConfigError, match=message):
        CaptionConfig(keys, probs)
