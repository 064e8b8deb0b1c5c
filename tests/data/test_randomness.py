from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest

from data.randomness import KeyedRandom


def philox(*key: int | str) -> np.random.Philox:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


@pytest.mark.parametrize("counts", [(22,), (1, 1, 1, 1, 1), (3, 4, 5, 2), (4, 8), (0, 7), (1, 1000)])
def test_a_stream_is_philox_under_the_hashed_key_however_it_is_drawn(counts: tuple[int, ...]) -> None:
    random = KeyedRandom("stream", 7, 1)
    drawn = np.concatenate([random.words(count) for count in counts])
    np.testing.assert_array_equal(drawn, philox("stream", 7, 1).random_raw(sum(counts)))


def test_streams_do_not_disturb_each_other() -> None:
    first, second = KeyedRandom("a"), KeyedRandom("b")
    mixed = [(int(first.words(1)[0]), int(second.words(1)[0])) for _ in range(9)]
    assert [a for a, _ in mixed] == philox("a").random_raw(9).tolist()
    assert [b for _, b in mixed] == philox("b").random_raw(9).tolist()


def test_threads_do_not_disturb_each_other() -> None:
    wrong: list[int] = []

    def draw(number: int) -> None:
        for index in range(300):
            expected = philox(number, index).random_raw(5)
            if not np.array_equal(KeyedRandom(number, index).words(5), expected):
                wrong.append(index)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_uniforms_are_below_one_and_permutations_whole() -> None:
    units = KeyedRandom("u").uniforms(1000)
    assert 0 <= units.min() < 0.01
    assert 0.99 < units.max() < 1
    assert sorted(KeyedRandom("p").permutation(50).tolist()) == list(range(50))
