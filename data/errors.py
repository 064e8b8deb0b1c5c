"""Errors that a user's data can cause. The message names the shard, sample or flag."""

from __future__ import annotations


class DataError(RuntimeError):
    """The data went bad while reading: too many samples lost, storage out of reach."""

    exit_code = 1


class DataConfigError(DataError):
    """The data as named cannot be trained on: the same command will fail again."""

    exit_code = 2


class ShardError(DataError):
    """One shard cannot be read (any further). The loader counts it under `kind` and goes on with the next.

    kind: "missing", "denied", "unreachable", "unreadable", "truncated", "corrupt", "short" or "empty".
    """

    def __init__(self, url: str, reason: str, kind: str):
        super().__init__(f"{url}: {reason}")
        self.url = url
        self.reason = reason
        self.kind = kind


class StorageError(ShardError):
    """A URL cannot be read: all attempts are spent, or the answer is final (missing, no permission)."""

    def __init__(self, url: str, reason: str, kind: str = "unreadable"):
        super().__init__(url, reason, kind)


class TarError(ShardError):
    """A tar ends in the middle of a member, or what should be a header is none; `offset` is the byte in the file."""

    def __init__(self, shard: str, reason: str, offset: int, kind: str = "truncated"):
        super().__init__(shard, f"{reason} at byte {offset}", kind)
        self.offset = offset
