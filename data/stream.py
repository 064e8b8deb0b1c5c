"""The contract of every stream of bytes, and how long to insist on one. Knows no protocol."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

CHUNK_BYTES = 8 << 20
SLOWEST_BYTES_S = 16 << 10  # what comes more slowly counts as standing still


@dataclass(frozen=True)
class Retry:
    """How long to insist.

    attempts: in a row without progress; `first_s`, `longest_s`: the pauses between them in seconds.
    silence_s: without a byte, after which a connection counts as broken.
    """

    attempts: int = 8
    first_s: float = 0.5
    longest_s: float = 30.0
    silence_s: float = 30.0

    def pause(self, attempt: int) -> None:
        """Sleeps before attempt number `attempt` (from 1 on); the jitter keeps workers from coming back together."""
        time.sleep(min(self.longest_s, self.first_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))


class Patience:
    """Counts the attempts on one range. Single bytes now and then do not keep it alive for ever."""

    def __init__(self, retry: Retry):
        self._retry = retry
        self._attempt = 0
        self._since = time.monotonic()

    def is_over(self, num_bytes: int) -> bool:
        """Notes a failed attempt that brought `num_bytes`; whether it was the last one."""
        now = time.monotonic()
        is_progress = num_bytes > 0 and num_bytes >= SLOWEST_BYTES_S * (now - self._since)
        self._attempt = 1 if is_progress else self._attempt + 1
        return self._attempt >= self._retry.attempts

    def pause(self) -> None:
        """Waits before the next attempt."""
        self._since = time.monotonic()
        self._retry.pause(self._attempt)


class ByteStream:
    """What `data.storage.open_stream` gives. `position` is the byte in the object that comes next."""

    position: int

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end. Raises StorageError."""
        raise NotImplementedError

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes; returns how many there were."""
        left = size
        while left and (data := self.read(min(left, CHUNK_BYTES))):
            left -= len(data)
        return size - left

    def close(self) -> None:
        """Ends the stream, at any point, without noise."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
