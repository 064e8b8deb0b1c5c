"""A file of this machine's file systems as a byte stream; network ones fail in passing, too."""

from __future__ import annotations

import errno

from data.errors import StorageError
from data.stream import ByteStream, Retry
from data.urls import local_path

_BUFFER_BYTES = 1 << 18
_FINAL_ERRNO = {errno.ENOENT: "missing", errno.ENOTDIR: "missing", errno.EACCES: "denied", errno.EPERM: "denied"}


class LocalStream(ByteStream):
    """Opens the file again where a read fails, and goes on at the same byte."""

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
        self._file = open(self._path, "rb", buffering=_BUFFER_BYTES)  # noqa: SIM115
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
