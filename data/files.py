"""Whole small files and binary file objects on top of `data.storage`: indexes, lists, class names, single pictures.

Writing is for scripts: in loader processes nothing is written, and fsspec's clients do not survive a fork.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, BinaryIO

from data.errors import StorageError
from data.storage import ByteStream, Retry, open_stream
from data.urls import is_local, local_path, mask_url

_CHUNK_BYTES = 1 << 20
_RETRY = Retry(attempts=4, silence_s=10.0)


def read_file(url: str) -> bytes:
    """The content of `url`; StorageError when it cannot be had."""
    with open_stream(url, retry=_RETRY, chunk_bytes=_CHUNK_BYTES, read_ahead=1) as stream:
        parts = []
        while part := stream.read(_CHUNK_BYTES):
            parts.append(part)
        return b"".join(parts)


def open_binary(url: str, offset: int = 0) -> io.BufferedReader:
    """`url` from byte `offset` on as a buffered binary file without seek; `tell` counts from `offset`."""
    stream = open_stream(url, offset=offset, retry=_RETRY, chunk_bytes=_CHUNK_BYTES, read_ahead=1)
    return io.BufferedReader(_Raw(stream), buffer_size=1 << 17)


def open_seekable(url: str) -> BinaryIO:
    """`url` as a binary file for formats that are read from their end. StorageError, here or while reading."""
    return io.BufferedReader(_Seekable(url), buffer_size=1 << 17)


def write_file(url: str, content: bytes) -> None:
    """Puts `content` at `url`, whole or not at all. Raises StorageError."""
    try:
        if is_local(url):
            _replace(local_path(url), content)
        else:
            import fsspec

            with fsspec.open(url, "wb") as file:
                file.write(content)
    except Exception as error:  # each file system has its own classes for a refusal
        raise StorageError(mask_url(url), f"cannot be written: {error}") from error


def _replace(path: str, content: bytes) -> None:
    """Not `tempfile`: its files are for their owner alone, and what is written here is read by a whole cluster."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


class _Raw(io.RawIOBase):
    def __init__(self, stream: ByteStream):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class _Seekable(io.RawIOBase):
    """Reads on where the last read ended, and opens the object anew elsewhere."""

    def __init__(self, url: str):
        self._url = url
        self._at = 0
        self._stream: ByteStream | None = None
        with self._open(0, chunk_bytes=512) as stream:
            self._size = stream.skip(sys.maxsize)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._stream is None or self._stream.position != self._at:
            self._drop()
            self._stream = self._open(self._at)
        data = self._stream.read(min(len(buffer), _CHUNK_BYTES, max(0, self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _open(self, offset: int, chunk_bytes: int = _CHUNK_BYTES) -> ByteStream:
        return open_stream(self._url, offset=offset, retry=_RETRY, chunk_bytes=chunk_bytes, read_ahead=0)

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
