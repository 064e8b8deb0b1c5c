"""Any URL as a stream of bytes: local paths, s3://, http(s)://, what else fsspec knows, and pipe:COMMAND.

One contract for all: `read` gives what was asked for or reaches the end, a broken connection goes on at the
byte where it broke, attempts are limited and spaced by exponential backoff with jitter, and what cannot be
read ends in one `StorageError`. Knows nothing of tar or samples.
"""

from __future__ import annotations

import collections
import errno
import random
import time
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from data.background import PER_PROCESS, DaemonPool
from data.errors import StorageError
from data.pipe import Command
from data.ranged import Filled, Interruption, RangeSource, source_of
from data.urls import is_local, is_pipe, local_path, mask_url

CHUNK_BYTES = 8 << 20
_FETCH_THREADS = 16
_LOCAL_BUFFER_BYTES = 1 << 18
_PIPE_ATTEMPTS = 3
_FINAL_ERRNO = {errno.ENOENT: "missing", errno.ENOTDIR: "missing", errno.EACCES: "denied", errno.EPERM: "denied"}


@dataclass(frozen=True)
class Retry:
    """How long to insist: attempts without a single new byte, and the pauses between them in seconds."""

    attempts: int = 8
    first_s: float = 0.5
    longest_s: float = 30.0

    def pause(self, attempt: int) -> None:
        """Sleeps before attempt number `attempt` (from 1 on); the jitter keeps workers from coming back together."""
        time.sleep(min(self.longest_s, self.first_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))


class ByteStream:
    """What `open_stream` gives. `position` is the byte in the object that comes next."""

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
    return RangedStream(url, source_of(url), offset, retry, chunk_bytes, read_ahead)


def probe(url: str) -> None:
    """Reads the first byte, once and without insisting; StorageError says why it cannot be had."""
    with open_stream(url, retry=Retry(attempts=1), chunk_bytes=512, read_ahead=0) as stream:
        stream.read(1)


class LocalStream(ByteStream):
    """A file of this machine's file systems, network ones included: those can fail in passing, too."""

    def __init__(self, url: str, offset: int, retry: Retry):
        self._url = url
        self._path = local_path(url)
        self._retry = retry
        self.position = offset
        self._open_insistently()

    def read(self, size: int) -> bytes:
        """See `ByteStream.read`."""
        try:
            data = self._file.read(size)
        except OSError as error:
            data = self._read_again(size, error)
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        """Seeks, but not beyond the end."""
        target = min(self.position + size, self._size)
        skipped = max(0, target - self.position)
        self._file.seek(self.position + skipped)
        self.position += skipped
        return skipped

    def close(self) -> None:
        """See `ByteStream.close`."""
        self._file.close()

    def _open(self) -> None:
        self._file = open(self._path, "rb", buffering=_LOCAL_BUFFER_BYTES)  # noqa: SIM115
        self._size = self._file.seek(0, 2)
        self._file.seek(self.position)

    def _open_insistently(self) -> None:
        for attempt in range(1, self._retry.attempts + 1):
            try:
                return self._open()
            except OSError as error:
                self._give_up_or_wait(error, attempt)

    def _read_again(self, size: int, error: OSError) -> bytes:
        for attempt in range(1, self._retry.attempts + 1):
            self._give_up_or_wait(error, attempt)
            try:
                self._file.close()
                self._open()
                return self._file.read(size)
            except OSError as again:
                error = again
        raise AssertionError("the last attempt raises")

    def _give_up_or_wait(self, error: OSError, attempt: int) -> None:
        kind = _FINAL_ERRNO.get(error.errno or 0)
        if kind or isinstance(error, IsADirectoryError) or attempt >= self._retry.attempts:
            raise StorageError(self._url, error.strerror or str(error), kind or "unreadable") from error
        self._retry.pause(attempt)


class PipeStream(ByteStream):
    """The output of a command. After a failure the command runs again and what had been read is skipped."""

    def __init__(self, url: str, offset: int, retry: Retry):
        self._url = url
        self._retry = retry
        self._left = min(retry.attempts, _PIPE_ATTEMPTS)
        self.position = 0
        self._command = Command(url)
        self._ended = False
        self.skip(offset)

    def read(self, size: int) -> bytes:
        """See `ByteStream.read`; the end is one only if the command ended with code 0."""
        data = b"" if self._ended else self._command.output.read(size)
        self.position += len(data)
        while len(data) < size and not self._ended:
            data += self._after_the_end(size - len(data))
        return data

    def _after_the_end(self, size: int) -> bytes:
        """Nothing, if the command is content; else the next bytes of another run."""
        try:
            self._command.check()
        except StorageError as error:
            self._run_again(error)
            data = self._command.output.read(size)
            self.position += len(data)
            return data
        self._ended = True
        return b""

    def _run_again(self, error: StorageError) -> None:
        self._left -= 1
        if self._left <= 0 or error.kind in ("missing", "denied"):
            raise error
        self._retry.pause(_PIPE_ATTEMPTS - self._left)
        self._command.close()
        self._command = Command(self._url)
        skipped = 0
        while skipped < self.position and (data := self._command.output.read(min(1 << 20, self.position - skipped))):
            skipped += len(data)

    def close(self) -> None:
        """Ends the command; one that we leave early has not failed."""
        self._command.close()


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
        count, attempt = 0, 0
        while True:
            try:
                filled = self._source.fill(buffer[count:], start + count)
                broke: Interruption | None = _unless_complete(filled, start + count, size - count)
            except Interruption as error:
                filled, broke = Filled(error.num_bytes, None), error
            count += filled.num_bytes
            if broke is None:
                return _Chunk(buffer[:count], filled.total)
            attempt = 1 if filled.num_bytes else attempt + 1
            if attempt >= self._retry.attempts:
                where = f" at byte {start + count}" if start + count else ""
                raise StorageError(self._url, f"{broke.reason} (gave up{where})", broke.kind) from broke
            self._retry.pause(attempt)


def _unless_complete(filled: Filled, start: int, size: int) -> Interruption | None:
    """An answer that ended before the object did is a broken one, however politely it ended."""
    expected = size if filled.total is None else min(size, filled.total - start)
    if filled.total is not None and filled.num_bytes < expected:
        return Interruption(f"the answer ended {expected - filled.num_bytes} bytes early", filled.num_bytes)
    return None
