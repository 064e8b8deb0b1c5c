"""Ranged reads from S3, HTTP and fsspec: one request fills part of a buffer, or says why it could not.

A source knows one object and no retries; `data.storage` decides what an `Interruption` costs. Clients are
made on first use in each process. S3 goes through botocore's own client, whose threads share connections:
s3fs keeps its event loop in one thread and does not survive a fork.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple, Protocol

from data.background import PER_PROCESS
from data.errors import StorageError
from data.urls import mask_url

_PIECE_BYTES = 1 << 18  # what a broken connection can lose of what had arrived
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 30
_CONNECTIONS = 64
_ALL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")


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


def source_of(url: str) -> RangeSource:
    """The source for a remote `url` by its protocol; opens nothing yet."""
    protocol = url.split("://", 1)[0].lower()
    if protocol in ("s3", "s3a", "s3n"):
        return S3Source(url)
    if protocol in ("http", "https"):
        return HttpSource(url)
    return FsspecSource(url)


class S3Source:
    """An object in S3, or in what speaks its protocol under AWS_ENDPOINT_URL."""

    sequential = False

    def __init__(self, url: str):
        self._url = url
        self._bucket, _, self._key = url.split("://", 1)[1].partition("/")
        self._etag: str | None = None
        self._anonymous = False

    def fill(self, view: memoryview, start: int) -> Filled:
        """See `RangeSource.fill`."""
        from botocore import exceptions as failures

        try:
            return self._get(view, start)
        except failures.ClientError as error:
            return self._explain(error, start)
        except (failures.NoCredentialsError, failures.PartialCredentialsError) as error:
            if self._anonymous:
                raise StorageError(self._url, f"no credentials ({error})", "denied") from error
            self._anonymous = True  # a public bucket needs none
            return self.fill(view, start)
        except (
            failures.HTTPClientError,
            failures.IncompleteReadError,
            failures.ResponseStreamingError,
            OSError,
        ) as error:
            raise Interruption(str(error)) from error
        except (failures.BotoCoreError, ValueError) as error:
            raise StorageError(self._url, str(error)) from error

    def _get(self, view: memoryview, start: int) -> Filled:
        client = PER_PROCESS.get(("s3", self._anonymous), functools.partial(_s3_client, self._anonymous))
        unchanged = {"IfMatch": self._etag} if self._etag else {}
        last = start + len(view) - 1
        answer = client.get_object(Bucket=self._bucket, Key=self._key, Range=f"bytes={start}-{last}", **unchanged)
        self._etag = answer.get("ETag")
        body = answer["Body"]
        try:
            if start and "ContentRange" not in answer:
                raise StorageError(self._url, "the server ignores ranges")
            total = _total_of(answer.get("ContentRange"), answer["ContentLength"])
            return Filled(_read_into(body.readinto, view[: max(0, total - start)]), total)
        finally:
            body.close()

    def _explain(self, error: Any, start: int) -> Filled:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        message = f"{code}: {error.response.get('Error', {}).get('Message', '')}"
        if status == 416 or code == "InvalidRange":
            return Filled(0, start)
        if code in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed"):
            PER_PROCESS.drop(("s3", self._anonymous))  # the next client reads the credentials anew
            raise Interruption(message, kind="denied") from error
        if status in (408, 425, 429) or status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling"):
            raise Interruption(message) from error
        raise StorageError(self._url, *self._final(code, status, message)) from error

    def _final(self, code: str, status: int, message: str) -> tuple[str, str]:
        if code == "NoSuchBucket":
            return f"no such bucket: {self._bucket}", "missing"
        if code in ("NoSuchKey", "404") or status == 404:
            return "no such object", "missing"
        if status == 412:
            return "the object changed while it was read", "unreadable"
        if status in (401, 403) and self._anonymous:
            return f"no AWS credentials found, and the bucket is not public ({message})", "denied"
        return (f"no permission ({message})", "denied") if status in (401, 403) else (message, "unreadable")

    def close(self) -> None:
        """Nothing to give back: the connections belong to the client."""


def _s3_client(anonymous: bool) -> Any:
    import botocore
    import botocore.session
    from botocore.config import Config

    settings = _fsspec_settings()
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        max_pool_connections=_CONNECTIONS,
        retries={"total_max_attempts": 1},  # ours go on at the byte where it broke
        response_checksum_validation="when_required",
        signature_version=botocore.UNSIGNED if anonymous or settings.get("anon") else None,
    )
    return botocore.session.get_session().create_client(
        "s3",
        config=config,
        endpoint_url=settings.get("endpoint_url"),
        aws_access_key_id=settings.get("key"),
        aws_secret_access_key=settings.get("secret"),
        aws_session_token=settings.get("token"),
        **settings.get("client_kwargs", {}),
    )


def _fsspec_settings() -> dict[str, Any]:
    """What the user's fsspec configuration (files, FSSPEC_S3_*) says about S3; the AWS environment fills the rest."""
    from fsspec.config import conf

    return dict(conf.get("s3", {}))


class HttpSource:
    """A file on a web server. One that ignores ranges is read in one go and again from the start after a break."""

    def __init__(self, url: str):
        self._url = url
        self.sequential = False
        self._whole: Any = None  # the open answer of a server without ranges
        self._whole_at = 0

    def fill(self, view: memoryview, start: int) -> Filled:
        """See `RangeSource.fill`."""
        import urllib3

        try:
            if self._whole is not None and self._whole_at <= start:
                return self._fill_from_whole(view, start)
            return self._get(view, start)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            self.close()
            raise Interruption(_short(error)) from error
        except Interruption:
            self.close()
            raise

    def _get(self, view: memoryview, start: int) -> Filled:
        self.close()
        pool = PER_PROCESS.get("http", _http_pool)
        asked = {"Range": f"bytes={start}-{start + len(view) - 1}", "Accept-Encoding": "identity"}
        answer = pool.request("GET", self._url, headers=asked, preload_content=False, retries=_redirects())
        if answer.status == 206:
            total = _total_of(answer.headers.get("Content-Range"), None)
            wanted = view if total is None else view[: max(0, total - start)]
            try:
                return Filled(_read_into(answer.readinto, wanted), total)
            finally:
                answer.release_conn()
        if answer.status == 200:
            self._whole, self._whole_at, self.sequential = answer, 0, True
            return self._fill_from_whole(view, start)
        answer.close()
        return self._refused(answer.status, start)

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

    def _skip_whole(self, start: int) -> None:
        while self._whole_at < start:
            data = self._whole.read(min(_PIECE_BYTES, start - self._whole_at))
            if not data:
                return
            self._whole_at += len(data)

    def _fill_from_whole(self, view: memoryview, start: int) -> Filled:
        self._skip_whole(start)
        length = self._whole.headers.get("Content-Length")
        total = int(length) if length else None
        wanted = view if total is None else view[: max(0, total - self._whole_at)]
        count = _read_into(self._whole.readinto, wanted)
        self._whole_at += count
        return Filled(count, total)

    def close(self) -> None:
        """Drops an open answer."""
        if self._whole is not None:
            self._whole.close()
            self._whole = None


def _http_pool() -> Any:
    import urllib3

    return urllib3.PoolManager(
        maxsize=_CONNECTIONS, timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=_READ_TIMEOUT_S)
    )


def _redirects() -> Any:
    import urllib3

    return urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5, raise_on_status=False)


class FsspecSource:
    """Anything else that fsspec knows: gs://, az://, hdfs://, memory://."""

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
            raise Interruption(_short(error)) from error
        view[: len(data)] = data
        return Filled(len(data), self._total)

    def close(self) -> None:
        """Nothing to give back: fsspec keeps its file systems."""


def _read_into(readinto: Any, view: memoryview) -> int:
    """Fills `view` piece by piece; a break raises Interruption with what had come."""
    count = 0
    while count < len(view):
        try:
            received = readinto(view[count : count + _PIECE_BYTES])
        except Exception as error:  # urllib3, botocore and sockets name a broken body in a dozen ways
            raise Interruption(_short(error), count) from error
        if not received:
            break
        count += received
    return count


def _total_of(content_range: str | None, length: int | None) -> Any:
    """Size of the whole object from `bytes 0-9/1234`; `length` if there was no range in the answer."""
    match = _ALL.match(content_range or "")
    return int(match.group(1)) if match else length


def _short(error: Exception) -> str:
    """One line without the object addresses of urllib3's messages."""
    reason = getattr(error, "reason", None) or error
    return re.sub(r"<[^<>]*>:?\s*|\s+", " ", f"{type(error).__name__}: {reason}").strip()[:300]
