"""Many cursors as one table."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cursors import CursorTable, LaneCursor

number = st.integers(-1, 2**62)
cuts = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2).map(tuple)
cursors = st.dictionaries(st.integers(0, 10**6), st.builds(LaneCursor, *[number] * 7, cuts), max_size=8)


@given(cursors)
def test_a_table_is_the_mapping_that_it_was_made_of_through_json_and_pickle(mapping: dict[int, LaneCursor]) -> None:
    table = CursorTable.of(mapping)
    assert table == mapping and list(table) == sorted(mapping) and len(table) == len(mapping)
    assert CursorTable.from_json(json.loads(json.dumps(table.to_json()))) == mapping
    assert pickle.loads(pickle.dumps(table)) == mapping


@given(cursors, st.integers(1, 4))
def test_parts_in_any_order_make_up_the_whole(mapping: dict[int, LaneCursor], parts: int) -> None:
    streams = list(mapping)
    tables = [CursorTable.of({stream: mapping[stream] for stream in streams[part::parts]}) for part in range(parts)]
    assert CursorTable.concat(tables) == mapping


def test_an_absent_stream_is_a_key_error_and_one_in_two_parts_is_refused() -> None:
    table = CursorTable.of({3: LaneCursor(1), 7: LaneCursor(2)})
    for stream in (2, 5, 8):
        with pytest.raises(KeyError):
            table[stream]
    with pytest.raises(ValueError, match="the same lane"):
        CursorTable.concat([table, CursorTable.of({7: LaneCursor()})])
