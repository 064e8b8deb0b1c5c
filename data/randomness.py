"""Random numbers as a function of a key: the same on every host, process and version.

The key is hashed (BLAKE2b) into a Philox counter generator, whose raw 64-bit words are part of its
definition. NumPy's `Generator` methods are not used: their streams may change between releases.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np

_WORD_TO_UNIT = 2.0**-53
_WORDS_PER_COUNT = 4


class _Generator(threading.local):
    """One Philox generator a thread, set to where a stream stands: making one costs ten times as much."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state: Any = dict(self._philox.state)

    def words(self, key: np.ndarray, start: int, count: int) -> np.ndarray:
        """Words number `start` to `start + count` of the stream under `key` (uint64 [2]), uint64 [count]."""
        counter, skipped = divmod(start, _WORDS_PER_COUNT)
        self._state["state"] = {"counter": np.array([counter, 0, 0, 0], np.uint64), "key": key}
        self._philox.state = self._state
        return np.atleast_1d(self._philox.random_raw(skipped + count))[skipped:]


_generator = _Generator()


class KeyedRandom:
    """A stream of random numbers that depends on its key alone, e.g. `KeyedRandom(seed, "crop", lane, index)`."""

    def __init__(self, *key: int | str):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        self._key = np.frombuffer(digest, "<u8")
        self._drawn = 0

    def words(self, count: int) -> np.ndarray:
        """`count` uniform 64-bit words, uint64 [count]."""
        words = _generator.words(self._key, self._drawn, count)
        self._drawn += count
        return words

    def uniforms(self, count: int) -> np.ndarray:
        """`count` uniform numbers in [0, 1) with 53 bits, float64 [count]."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * _WORD_TO_UNIT

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One uniform number in [low, high)."""
        return low + (high - low) * float(self.uniforms(1)[0])

    def permutation(self, count: int) -> np.ndarray:
        """A uniform permutation of range(count), int64 [count]: the stable order of `count` random words."""
        return np.argsort(self.words(count), kind="stable")
