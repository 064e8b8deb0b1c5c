"""Whole small files and binary file objects on top of `data.storage`: indexes, lists, class names, single pictures."""

from __future__ import annotations

import io
from typing import Any

from data.storage import ByteStream, Retry, open_stream

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
