"""What a source of ranged reads owes: one request fills part of a buffer, or says why it could not.

A source knows one object and no retries; `data.storage` decides what an `Interruption` costs.
"""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple, Protocol

from data.stream import SLOWEST_BYTES_S

CONNECT_TIMEOUT_S = 5.0
CONNECTIONS = 64
_PIECE_BYTES = 1 << 18
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")


class Filled(NamedTuple):
    """How many bytes came, and the size of the object where the answer told it."""

    num_bytes: int
    total: int | None


class Interruption(Exception):
    """A request that may succeed when repeated; `num_bytes` had come before it broke."""

    def __init__(self, reason: str, num_bytes: int = 0, kind: str = "unreachable"):
        super().__init__(reason)
        self.reason = reason
        self.num_bytes = num_bytes
        self.kind = kind


class RangeSource(Protocol):
    """One remote object. `sequential`: its server gives no ranges, so requests must follow one another."""

    sequential: bool

    def fill(self, view: memoryview, start: int) -> Filled:
        """Writes the bytes from `start` on into `view`; fewer than its length only at the end of the object.

        Raises Interruption, or StorageError when asking again is useless.
        """

    def close(self) -> None:
        """Gives back what the source holds."""


def receive(answer: Any, view: memoryview, silence_s: float) -> int:
    """Fills `view` from the body of a urllib3 response; returns how many bytes there were.

    Takes what has come, not what was asked for, so that a break loses nothing and a trickle is seen. Raises
    Interruption with the count at a break, or after `silence_s` seconds when it all came too slowly.
    """
    count, began = 0, time.monotonic()
    while count < len(view):
        try:
            data = answer.read1(min(_PIECE_BYTES, len(view) - count))
        except Exception as error:  # urllib3 and sockets name a broken body in a dozen ways
            raise Interruption(short(error), count) from error
        if not data:
            break
        view[count : count + len(data)] = data
        count += len(data)
        elapsed = time.monotonic() - began
        if elapsed > silence_s and count < SLOWEST_BYTES_S * elapsed:
            raise Interruption(f"only {count} bytes in {elapsed:.0f} s", count)
    return count


def give_back(answer: Any) -> None:
    """The connection of a urllib3 response: to its pool after a whole body, otherwise it is closed."""
    if answer.length_remaining == 0:
        answer.drain_conn()  # http.client wants to have seen the end
        answer.release_conn()
    else:
        answer.close()


def total_of(content_range: str | None, length: int | None, start: int) -> int | None:
    """Size of the whole object from `bytes 0-9/1234`; `length` if there was no range in the answer.

    Raises Interruption for another range than the one from `start` on.
    """
    match = _RANGE.match(content_range or "")
    if match is None:
        return length
    if match[1] is not None and int(match[1]) != start:
        raise Interruption(f"the answer holds another range ({content_range}) than the one from {start} on")
    return int(match[2])


def short(error: BaseException) -> str:
    """One line without the object addresses of urllib3's messages."""
    reason = getattr(error, "reason", None) or error
    return re.sub(r"<[^<>]*>:?\s*|\s+", " ", f"{type(error).__name__}: {reason}").strip()[:300]
