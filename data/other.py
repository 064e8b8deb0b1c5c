"""Ranged reads from whatever else fsspec knows: gs://, az://, hdfs://, memory://, chained URLs. Knows no retries."""

from __future__ import annotations

from data.errors import StorageError
from data.ranged import Filled, Interruption, short
from data.urls import mask_url


class FsspecSource:
    """An object of some fsspec file system, which has its own ideas of time-outs and connections."""

    sequential = False

    def __init__(self, url: str):
        self._url = url
        self._total: int | None = None

    def fill(self, view: memoryview, start: int) -> Filled:
        """See `RangeSource.fill`."""
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self._url)
            if self._total is None:
                self._total = int(system.size(path))
            end = min(start + len(view), self._total)
            data = system.cat_file(path, start=start, end=end) if start < end else b""
        except FileNotFoundError as error:
            raise StorageError(mask_url(self._url), "no such file", "missing") from error
        except PermissionError as error:
            raise StorageError(mask_url(self._url), f"no permission ({error})", "denied") from error
        except (ImportError, ValueError, TypeError) as error:  # unknown protocol, missing package, wrong setting
            raise StorageError(mask_url(self._url), str(error)) from error
        except Exception as error:  # each file system has its own classes for a lost connection
            raise Interruption(short(error)) from error
        view[: len(data)] = data
        return Filled(len(data), self._total)

    def close(self) -> None:
        """Nothing to give back: fsspec keeps its file systems."""
