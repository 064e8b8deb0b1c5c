"""Ranged reads from web servers. Knows no retries; the pool of connections is made on first use in each process."""

from __future__ import annotations

import threading
from typing import Any

from data.background import PER_PROCESS
from data.errors import StorageError
from data.ranged import CONNECT_TIMEOUT_S, CONNECTIONS, Filled, Interruption, give_back, receive, short, total_of
from data.urls import mask_url

_SKIP_BYTES = 1 << 18


class HttpSource:
    """A file on a web server. One that ignores ranges is read in one go and again from the start after a break."""

    def __init__(self, url: str, silence_s: float):
        self._url = url
        self._silence_s = silence_s
        self.sequential = False
        self._whole: Any = None  # the open answer of a server without ranges
        self._whole_at = 0
        self._lock = threading.Lock()  # of that answer: ranges may have been in flight when it turned out

    def fill(self, view: memoryview, start: int) -> Filled:
        """See `RangeSource.fill`."""
        import urllib3

        try:
            if not self.sequential:
                answer = self._request(view, start)
                if answer.status != 200:
                    return self._fill_from_range(answer, view, start)
                self._keep(answer)
            with self._lock:
                return self._fill_from_whole(view, start)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Interruption(short(error)) from error

    def _request(self, view: memoryview, start: int) -> Any:
        import urllib3

        pool = PER_PROCESS.get("http", lambda: urllib3.PoolManager(maxsize=CONNECTIONS))
        wait = urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, self._silence_s), read=self._silence_s)
        asked = {"Range": f"bytes={start}-{start + len(view) - 1}", "Accept-Encoding": "identity"}
        return pool.request("GET", self._url, headers=asked, preload_content=False, retries=_redirects(), timeout=wait)

    def _keep(self, answer: Any) -> None:
        """Goes on with the whole file that came instead of a range, unless another request has brought it before."""
        with self._lock:
            self.sequential = True
            if self._whole is None:
                self._whole, self._whole_at = answer, 0
            else:
                answer.close()

    def _fill_from_range(self, answer: Any, view: memoryview, start: int) -> Filled:
        try:
            if answer.status != 206:
                return self._refused(answer.status, start)
            total = total_of(answer.headers.get("Content-Range"), None, start)
            wanted = view if total is None else view[: max(0, total - start)]
            return Filled(receive(answer, wanted, self._silence_s), total)
        finally:
            give_back(answer)

    def _refused(self, status: int, start: int) -> Filled:
        if status == 416:
            return Filled(0, start)
        if status in (404, 410):
            raise StorageError(mask_url(self._url), f"no such file (HTTP {status})", "missing")
        if status in (401, 403):
            raise StorageError(mask_url(self._url), f"no permission (HTTP {status})", "denied")
        if status in (408, 425, 429) or status >= 500:
            raise Interruption(f"HTTP {status}")
        raise StorageError(mask_url(self._url), f"HTTP {status}")

    def _fill_from_whole(self, view: memoryview, start: int) -> Filled:
        if self._whole is None or self._whole_at > start:
            self._open_whole(view)
        try:
            self._skip_to(start)
            length = self._whole.headers.get("Content-Length")
            total = int(length) if length else None
            wanted = view if total is None else view[: max(0, total - start)]
            if self._whole_at < start:
                wanted = view[:0]
            count = receive(self._whole, wanted, self._silence_s)
        except Exception:
            self._drop_whole()
            raise
        self._whole_at += count
        return Filled(count, total)

    def _open_whole(self, view: memoryview) -> None:
        self._drop_whole()
        answer = self._request(view, 0)
        if answer.status != 200:
            answer.close()
            self._refused(answer.status, 0)
            raise Interruption(f"HTTP {answer.status} from a server that gave no ranges before")
        self._whole, self._whole_at = answer, 0

    def _skip_to(self, start: int) -> None:
        buffer = memoryview(bytearray(_SKIP_BYTES))
        while self._whole_at < start:
            try:
                count = receive(self._whole, buffer[: start - self._whole_at], self._silence_s)
            except Interruption as error:
                raise Interruption(error.reason) from error  # what was skipped is none of the bytes asked for
            if not count:
                return
            self._whole_at += count

    def _drop_whole(self) -> None:
        if self._whole is not None:
            self._whole.close()
            self._whole = None

    def close(self) -> None:
        """Drops an open answer."""
        self._drop_whole()


def _redirects() -> Any:
    import urllib3

    return urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5, raise_on_status=False)
