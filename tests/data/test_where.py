from __future__ import annotations

import json
import math
import pickle
import time
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.errors import DataConfigError
from data.samples import RawSample, SampleError, record_of
from data.where import Filter, Where

# The fields that LAION's tables have and img2dataset passes on, with the values that occur.
LAION = {
    "NSFW": "UNLIKELY",
    "similarity": 0.33,
    "punsafe": 0.02,
    "pwatermark": None,
    "AESTHETIC_SCORE": math.nan,
    "original_width": 800,
    "original_height": 600,
    "TEXT": "A Red Fox",
    "exif": {"Image Make": "X", "gps": {"lat": -3.5}},
    "tags": ["fox", "snow"],
    "LICENSE": "?",
    "odd name": 1,
    "a.b": 2,
    "record": 3,
    "index": "7",
}


def keeps(text: str, record: dict[str, Any] | None = None) -> bool:
    return Where.parse(text).keeps(LAION if record is None else record)


@pytest.mark.parametrize(
    "text",
    [
        "NSFW in ['UNLIKELY'] and similarity > 0.3",
        "NSFW in ('UNLIKELY', 'UNSURE')",
        "NSFW == 'UNLIKELY' and not punsafe > 0.5",
        "0.3 < similarity <= 0.33 < 1",
        "original_width >= 512 and original_height >= 512",
        "original_width / original_height < 3 and original_width * original_height > 4e5",
        "original_width - original_height == 200 and original_width + 1 == 801",
        "-similarity < -0.3 and similarity != -1 and +punsafe < .1",
        "pwatermark is None and missing is None and similarity is not None",
        "(missing or 1) > 0.5",
        "'fox' in tags and 'cat' not in tags and 'Red' in TEXT and tags[0] == 'fox'",
        "tags == ['fox', 'snow'] and index in {'7', 7}",
        "lower(TEXT) == 'a red fox' and len(TEXT) < 20 and len(tags) == 2 and len(exif) == 2",
        "record['odd name'] == 1 and record['a.b'] == 2 and record['record'] == 3",
        "exif['Image Make'] == 'X' and exif['gps']['lat'] < 0 and record['exif']['gps']['lat'] == -3.5",
        "True and not False and not None",
        "  similarity > 0.3  # with a remark",
        "(similarity > 0.3\n and punsafe < 0.1)",
    ],
)
def test_an_expression_that_holds_keeps_the_sample(text: str) -> None:
    assert keeps(text)
    assert not keeps(f"not ({text}\n)")


@pytest.mark.parametrize(
    "text",
    [
        "missing > 0", "missing < 0", "missing == 0", "pwatermark < 0.8", "NSFW > 0.5", "NSFW < 0.5", "tags < 3",
        "AESTHETIC_SCORE > 5", "AESTHETIC_SCORE <= 5", "index == 7", "index > 3", "3 in index", "'a' in missing",
        "'a' in similarity", "tags in {1, 2}", "missing + 1 > 0", "NSFW + 1 == 1", "similarity / 0 > 0", "tags[5] == 1",
        "tags['a'] == 1", "TEXT['a'] == 1", "missing['a']['b'] == 1", "exif['no']['no'] == 1", "len(similarity) >= 0",
        "lower(similarity) == '0.33'", "1e999 * 0 == 0", "-NSFW < 0", "exif[0] == 1",
    ],
)  # fmt: skip
def test_what_is_missing_or_of_another_type_fails_the_comparison_and_nothing_else(text: str) -> None:
    assert not keeps(text)


def test_the_fields_that_are_read_are_known() -> None:
    assert Where.parse("a > 1 and record['b c'] in [1] and d['e']['f'] == 'g' and a").fields == {"a", "b c", "d"}


def test_it_goes_to_other_processes_as_its_text() -> None:
    where = pickle.loads(pickle.dumps(Where.parse(" similarity > 0.3")))
    assert where.text == "similarity > 0.3" and where.fields == {"similarity"}
    assert where.keeps(LAION) and not where.keeps({})


@pytest.mark.parametrize(
    ("text", "part", "place", "why"),
    [
        ("__import__('os').system('true')", "__import__('os').system('true')", 1, "len(x) and lower(text)"),
        ("a > 1 and ().__class__", "().__class__", 11, "a field inside a field"),
        ("a.b > 1", "a.b", 1, "record['a.b']"),
        ("ümlaut > 1 and (lambda: 1)", "lambda: 1", 17, "is not allowed"),
        ("[x for x in y]", "[x for x in y]", 1, "is not allowed"),
        ("{x: 1}", "{x: 1}", 1, "is not allowed"),
        ("f'{a}' == b", "f'{a}'", 1, "is not allowed"),
        ("(a := 1) > 0", "a := 1", 2, "is not allowed"),
        ("9**9**9 > a", "9**9**9", 1, "operator"),
        ("a % 2 == 0", "a % 2", 1, "operator"),
        ("~a", "~a", 1, "operator"),
        ("'a' * 1000000000 == b", "'a'", 1, "+ - * / are for numbers"),
        ("a if b else c", "a if b else c", 1, "is not allowed"),
        ("a in [1, [2]]", "[2]", 10, "is no number"),
        ("a in [b]", "b", 7, "is no number"),
        ("a == b'x'", "b'x'", 6, "is no number"),
        ("a == 1j", "1j", 6, "is no number"),
        ("a is 3", "3", 6, "write =="),
        ("record > 1", "record", 1, "record['name']"),
        ("a[b]", "b", 3, "name in quotes"),
        ("record[0]", "0", 8, "name in quotes"),
        ("a[True]", "True", 3, "name in quotes"),
        ("a[1:2]", "1:2", 3, "name in quotes"),
        ("len(a, b)", "len(a, b)", 1, "only calls"),
        ("max(a)", "max(a)", 1, "only calls"),
        ("a > 0.3 && b", "&", 10, "invalid syntax"),
        ("a = 3", "=", 3, "invalid syntax"),
        ("class == 3", "class", 1, "invalid syntax"),
        ("a > ", "the end", 4, "invalid syntax"),
        ("a > 1\nand b > 1", "and", 7, "invalid syntax"),
    ],
)
def test_what_is_not_known_is_refused_by_name_and_place(text: str, part: str, place: int, why: str) -> None:
    with pytest.raises(DataConfigError) as caught:
        Where.parse(text)
    message = str(caught.value)
    assert message.startswith("--where ") and "\n" not in message and message.isprintable()
    shown = part if part == "the end" else repr(part)
    assert f"at character {place}: {shown} " in message
    assert why in message and "known are field names" in message


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\0", "a\0", "\ud800 > 1", "(" * 4000, "-" * 4000 + "1",
        "[" + "-" * 3000 + "1]", "not " * 1000 + "a", "1" + "+1" * 2000, "a" + "['b']" * 800, "a" + ".b" * 2000,
        "a < " * 1000, "len(" * 800 + "a" + ")" * 800, "'" + "a" * 5000 + "'", "9" * 5000, "x" * 4097,
    ],
)  # fmt: skip
def test_long_deep_and_empty_expressions_are_refused_at_once(text: str) -> None:
    begin = time.process_time()
    with pytest.raises(DataConfigError, match="--where"):
        Where.parse(text)
    assert time.process_time() - begin < 2


def test_long_lists_and_many_conditions_are_no_depth() -> None:
    assert keeps(f"similarity in {[n / 100 for n in range(500)]}")
    assert keeps(" or ".join(f"original_width == {n}" for n in range(700, 801)))


def test_numbers_do_not_grow_for_ever() -> None:
    product = "*".join(["big"] * 60)
    begin = time.process_time()
    assert not keeps(f"{product} > 0", {"big": 10**4000})
    assert keeps(f"({product}) is None", {"big": 10**100})
    assert keeps("big / 3 is None and big * 1.5 is None", {"big": 10**308 * 100})
    assert time.process_time() - begin < 1


NUMBERS = st.integers(-5, 5) | st.floats(-5, 5).map(lambda value: round(value, 2))
TEXTS = st.sampled_from(["", "a", "ab", "UNLIKELY", "b'c", "ü"])


def numbers(depth: int) -> st.SearchStrategy[str]:
    leaf = NUMBERS.map(repr) | st.sampled_from(["n", "m", "d['n']", "record['o p']", "len(s)"])
    if not depth:
        return leaf
    below = numbers(depth - 1)
    binary = st.tuples(below, st.sampled_from("+-*"), below).map(lambda parts: f"({' '.join(parts)})")
    divided = st.tuples(below, st.sampled_from(["2", "-0.5"])).map(lambda parts: f"({parts[0]} / {parts[1]})")
    return leaf | binary | divided | below.map(lambda text: f"(-{text})")


def conditions(depth: int) -> st.SearchStrategy[str]:
    number, text = numbers(2), TEXTS.map(repr) | st.sampled_from(["s", "lower(s)", "d['s']", "l[0]"])
    order = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    chain = st.tuples(number, order, number, order, number) | st.tuples(text, order, text)
    member = st.tuples(text, st.sampled_from(["in", "not in"]), st.lists(TEXTS).map(repr) | st.just("l") | text)
    listed = st.tuples(number, st.sampled_from(["in", "not in"]), st.lists(NUMBERS, min_size=1).map(tuple).map(repr))
    empty = st.tuples(number | text, st.sampled_from(["is", "is not"]), st.just("None"))
    leaf = st.one_of(chain, member, listed, empty).map(" ".join) | st.sampled_from(["t", "True", "False", "s", "n"])
    if not depth:
        return leaf
    below = conditions(depth - 1)
    joined = st.tuples(below, st.sampled_from(["and", "or"]), below).map(lambda parts: f"({' '.join(parts)})")
    return leaf | joined | below.map(lambda text: f"not {text}")


@settings(max_examples=300, deadline=None)
@given(
    text=conditions(3),
    n=NUMBERS,
    m=NUMBERS,
    s=TEXTS,
    t=st.booleans(),
    other=st.tuples(NUMBERS, TEXTS),
    l=st.lists(TEXTS, min_size=1),
)
def test_on_whole_records_it_means_what_python_means(text: str, other: tuple[Any, str], **fields: Any) -> None:
    record = {**fields, "d": {"n": other[0], "s": other[1]}, "o p": other[0]}
    functions = {"lower": str.lower, "len": len, "record": record}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `3 is None` is odd, not wrong
        expected = eval(text, {"__builtins__": {}}, {**record, **functions})
    assert Where.parse(text).keeps(record) == bool(expected)


PIECES = st.sampled_from(
    ["a", "b", "record", "(", ")", "[", "]", "{", "}", "'", '"', ",", ":", ".", "+", "-", "*", "/", "**", "<", ">",
     "==", "!=", "in", "not", "is", "and", "or", "None", "True", "lambda", "1", "1e9", "'x'", "\n", "#", "\\", "f"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(max_size=60) | st.lists(PIECES, max_size=25).map(" ".join) | conditions(2),
    record=st.dictionaries(st.sampled_from(["a", "b", "n", "m", "s", "d", "l"]), VALUES),
)
@example(text="a < b", record={"a": [1], "b": ["x"]})
def test_no_text_and_no_record_raises_anything_else(text: str, record: dict[str, Any]) -> None:
    try:
        where = Where.parse(text)
    except DataConfigError:
        return
    assert where.keeps(record) in (True, False)


def raw(**fields: bytes) -> RawSample:
    return RawSample("k", "s.tar", 0, fields)


def test_a_sample_is_kept_by_its_json_record_alone() -> None:
    chosen = Filter(Where.parse("similarity > 0.3"))
    assert chosen.keeps(raw(json=b'{"similarity": 0.4}'))
    assert not chosen.keeps(raw(json=b'{"similarity": 0.2}'))
    assert not chosen.keeps(raw(json=b'{"similarity": NaN}'))
    assert not chosen.keeps(raw(txt=b"no record"))
    assert not chosen.keeps(raw(json=b"{"))
    assert not chosen.keeps(raw(json=b"[0.4]"))
    assert not Filter(Where.parse("not similarity > 0.3")).keeps(raw(txt=b"no record"))


def test_a_record_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = raw(json=b'\xef\xbb\xbf{"a": 1}')
    assert record_of(sample) == {"a": 1}
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("parsed again"))
    assert record_of(sample) == {"a": 1}
    assert sample == raw(json=b'\xef\xbb\xbf{"a": 1}')


def test_a_row_of_a_table_brings_its_record() -> None:
    assert Filter(Where.parse("a == 1")).keeps(RawSample("k", "s", 0, {}, record={"a": 1}))


@pytest.mark.parametrize(("fields", "reason"), [({"txt": b"a"}, "no_json"), ({"json": b"[" * 100_000}, "broken_json")])
def test_without_a_readable_record_the_reason_is_given(fields: dict[str, bytes], reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        record_of(raw(**fields))
    assert caught.value.reason == reason
