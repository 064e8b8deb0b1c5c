"""Any URL as a stream of bytes: local paths, s3://, http(s)://, what else fsspec knows, and pipe:COMMAND.

One contract for all: `read` gives what was asked for or reaches the end, a broken connection goes on at the
byte where it broke, attempts are limited and spaced by exponential backoff with jitter, and what cannot be
read ends in one `StorageError`. Knows nothing of tar or samples.
"""

from __future__ import annotations

import collections
from concurrent.futures import Future
from typing import NamedTuple

from data.background import PER_PROCESS, DaemonPool
from data.errors import StorageError
from data.local import LocalStream
from data.other import FsspecSource
from data.pipe import PipeStream
from data.ranged import Filled, Interruption, RangeSource
from data.s3 import S3Source
from data.stream import CHUNK_BYTES, ByteStream, Patience, Retry
from data.urls import is_local, is_pipe, mask_url
from data.web import HttpSource

__all__ = ["CHUNK_BYTES", "PROBE", "ByteStream", "Retry", "open_stream", "probe"]

# At start somebody waits, and an answer that takes longer is worth a message.
PROBE = Retry(attempts=2, silence_s=5.0)
# Waiting costs a thread next to nothing; a few slow servers must not keep the others' ranges from being asked for.
_FETCH_THREADS = 64


def open_stream(
    url: str, *, offset: int = 0, retry: Retry | None = None, chunk_bytes: int = CHUNK_BYTES, read_ahead: int = 2
) -> ByteStream:
    """`url` from byte `offset` on; a context manager.

    Remote objects are read in ranges of `chunk_bytes`, `read_ahead` of them in flight while one is consumed.
    Raises StorageError, here or while reading.
    """
    retry = retry or Retry()
    if is_pipe(url):
        return PipeStream(url, offset, retry)
    if is_local(url):
        return LocalStream(url, offset, retry)
    return RangedStream(url, source_of(url, retry.silence_s), offset, retry, chunk_bytes, read_ahead)


def probe(url: str) -> None:
    """Reads the first byte, once and without insisting; StorageError says within seconds why it cannot be had."""
    with open_stream(url, retry=Retry(attempts=1, silence_s=PROBE.silence_s), chunk_bytes=512, read_ahead=0) as stream:
        stream.read(1)


def source_of(url: str, silence_s: float) -> RangeSource:
    """The source for a remote `url` by its protocol; opens nothing yet."""
    protocol = url.split("://", 1)[0].lower()
    if protocol in ("s3", "s3a", "s3n"):
        return S3Source(url, silence_s)
    if protocol in ("http", "https"):
        return HttpSource(url, silence_s)
    return FsspecSource(url)


class _Chunk(NamedTuple):
    data: memoryview
    total: int | None


class RangedStream(ByteStream):
    """A remote object in ranges, the next ones fetched by threads while one is consumed."""

    def __init__(self, url: str, source: RangeSource, offset: int, retry: Retry, chunk_bytes: int, read_ahead: int):
        self._url = mask_url(url)
        self._source = source
        self._retry = retry
        self._chunk_bytes = chunk_bytes
        self._read_ahead = read_ahead
        self._ahead: collections.deque[Future[_Chunk]] = collections.deque()
        self._next = offset  # where the next request begins
        self._total: int | None = None
        self._ended = False
        self._is_closed = False  # requests in flight need not insist any more
        self._chunk = memoryview(b"")
        self._at = 0
        self.position = offset

    def read(self, size: int) -> bytes:
        """See `ByteStream.read`."""
        end = self._at + size
        if end <= len(self._chunk):
            data = bytes(self._chunk[self._at : end])
            self._at = end
        else:
            data = self._read_across(size)
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        """Moves on; whole ranges in between are never requested where the object's size is known."""
        if self._total is None and not self._ended:
            self._load()
        if self._total is None:
            return super().skip(size)
        skipped = max(0, min(size, self._total - self.position))
        self.position += skipped
        self._at += skipped
        while self._at > len(self._chunk):
            beyond = self._at - len(self._chunk)
            if not self._ahead:
                self._next += beyond
                self._chunk, self._at = memoryview(b""), 0
                break
            self._chunk, self._at = self._take(), beyond
        return skipped

    def close(self) -> None:
        """Drops what is in flight."""
        self._is_closed = True
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._chunk = memoryview(b"")
        self._source.close()

    def _read_across(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._chunk[self._at : self._at + size]
            self._at += len(part)
            size -= len(part)
            parts.append(part)
            if size and not self._load():
                break
        return b"".join(parts)

    def _load(self) -> bool:
        """The next range becomes the current one; False at the end of the object."""
        if not self._ahead:
            if self._ended if self._total is None else self._next >= self._total:
                return False
            self._request()
        self._chunk, self._at = self._take(), 0
        return len(self._chunk) > 0

    def _take(self) -> memoryview:
        chunk = self._ahead.popleft().result()
        if chunk.total is None:
            self._ended = len(chunk.data) < self._chunk_bytes
            return chunk.data
        self._total = chunk.total
        in_flight = min(1, self._read_ahead) if self._source.sequential else self._read_ahead
        while self._next < self._total and len(self._ahead) < in_flight:
            self._request()
        return chunk.data

    def _request(self) -> None:
        size = self._chunk_bytes if self._total is None else min(self._chunk_bytes, self._total - self._next)
        pool = PER_PROCESS.get("fetch", lambda: DaemonPool(_FETCH_THREADS, "fetch"))
        self._ahead.append(pool.submit(self._fetch, self._next, size))
        self._next += size

    def _fetch(self, start: int, size: int) -> _Chunk:
        """One range, however many requests it takes."""
        buffer = memoryview(bytearray(size))
        count, patience = 0, Patience(self._retry)
        while True:
            try:
                filled = self._source.fill(buffer[count:], start + count)
                broke: Interruption | None = _unless_complete(filled, start + count, size - count)
            except Interruption as error:
                filled, broke = Filled(error.num_bytes, None), error
            count += filled.num_bytes
            if broke is None:
                return _Chunk(buffer[:count], filled.total)
            if self._is_closed or patience.is_over(filled.num_bytes):
                where = f" at byte {start + count}" if start + count else ""
                raise StorageError(self._url, f"{broke.reason} (gave up{where})", broke.kind) from broke
            patience.pause()


def _unless_complete(filled: Filled, start: int, size: int) -> Interruption | None:
    """An answer that ended before the object did is a broken one, however politely it ended."""
    expected = size if filled.total is None else min(size, filled.total - start)
    if filled.total is not None and filled.num_bytes < expected:
        return Interruption(f"the answer ended {expected - filled.num_bytes} bytes early", filled.num_bytes)
    return None
