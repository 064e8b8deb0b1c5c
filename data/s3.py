"""Ranged reads from S3, and from what speaks its protocol under AWS_ENDPOINT_URL. Knows no retries.

Through botocore's own client, made on first use in each process, whose threads share connections: s3fs keeps
its event loop in one thread and does not survive a fork.
"""

from __future__ import annotations

from typing import Any

from data.background import PER_PROCESS
from data.errors import StorageError
from data.ranged import CONNECT_TIMEOUT_S, CONNECTIONS, Filled, Interruption, give_back, receive, short, total_of

_STALE = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed")
_BUSY = ("SlowDown", "RequestTimeout", "Throttling", "InternalError", "ServiceUnavailable")
_FALSE = ("", "0", "false", "no", "off")


class S3Source:
    """One object."""

    sequential = False

    def __init__(self, url: str, silence_s: float):
        self._url = url
        self._silence_s = silence_s
        self._bucket, _, self._key = url.split("://", 1)[1].partition("/")
        self._etag: str | None = None
        self._anonymous = False

    def fill(self, view: memoryview, start: int) -> Filled:
        """See `RangeSource.fill`."""
        from botocore import exceptions as failures

        client = None
        try:
            client = self._client()
            return self._get(client, view, start)
        except failures.ClientError as error:
            return self._explain(error, start, client)
        except (failures.NoCredentialsError, failures.PartialCredentialsError) as error:
            if self._anonymous:
                raise StorageError(self._url, f"no credentials ({error})", "denied") from error
            self._anonymous = True  # a public bucket needs none
            return self.fill(view, start)
        except (failures.CredentialRetrievalError, failures.MetadataRetrievalError) as error:
            self._forget(client)
            raise Interruption(short(error), kind="denied") from error
        except failures.ProfileNotFound as error:
            raise StorageError(self._url, f"{error} (AWS_PROFILE)", "denied") from error
        except (
            failures.ConnectionError,
            failures.HTTPClientError,
            failures.IncompleteReadError,
            OSError,
        ) as error:
            raise Interruption(str(error)) from error
        except (failures.BotoCoreError, ValueError) as error:
            raise StorageError(self._url, str(error)) from error

    def _client(self) -> Any:
        return PER_PROCESS.get(self._client_key, lambda: _new_client(self._anonymous, self._silence_s))

    @property
    def _client_key(self) -> tuple[str, bool, float]:
        return "s3", self._anonymous, self._silence_s

    def _forget(self, client: Any) -> None:
        """The next client reads the credentials anew; one that another thread has made meanwhile stays."""
        PER_PROCESS.drop(self._client_key, client)

    def _get(self, client: Any, view: memoryview, start: int) -> Filled:
        wanted = {"Bucket": self._bucket, "Key": self._key, "Range": f"bytes={start}-{start + len(view) - 1}"}
        if self._etag:
            wanted["IfMatch"] = self._etag
        if _is_on(_settings().get("requester_pays")):
            wanted["RequestPayer"] = "requester"
        answer = client.get_object(**wanted)
        self._etag = answer.get("ETag")
        # Not through botocore's own body: it can only wait until all that was asked for has come.
        body = answer["Body"]._raw_stream
        try:
            if start and "ContentRange" not in answer:
                raise StorageError(self._url, "the server ignores ranges")
            total = total_of(answer.get("ContentRange"), answer["ContentLength"], start)
            assert total is not None
            return Filled(receive(body, view[: max(0, total - start)], self._silence_s), total)
        finally:
            give_back(body)

    def _explain(self, error: Any, start: int, client: Any) -> Filled:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        message = f"{code}: {error.response.get('Error', {}).get('Message', '')}"
        if status == 416 or code == "InvalidRange":
            return Filled(0, start)
        if code in _STALE:
            self._forget(client)
            raise Interruption(message, kind="denied") from error
        if status in (408, 425, 429) or status >= 500 or code in _BUSY:
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


def _new_client(anonymous: bool, silence_s: float) -> Any:
    import botocore
    import botocore.session
    from botocore.config import Config

    settings = _settings()
    anonymous = anonymous or _is_on(settings.get("anon"))
    ours = Config(
        connect_timeout=min(CONNECT_TIMEOUT_S, silence_s),
        read_timeout=silence_s,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},  # ours go on at the byte where it broke
        response_checksum_validation="when_required",
        signature_version=botocore.UNSIGNED if anonymous else None,
    )
    session = botocore.session.Session(profile=settings.get("profile"))
    return session.create_client(
        "s3",
        config=Config(**settings.get("config_kwargs", {})).merge(ours),
        endpoint_url=settings.get("endpoint_url"),
        aws_access_key_id=settings.get("key"),
        aws_secret_access_key=settings.get("secret"),
        aws_session_token=settings.get("token"),
        **settings.get("client_kwargs", {}),
    )


def _settings() -> dict[str, Any]:
    """What the user's fsspec configuration (files, FSSPEC_S3_*) says about S3; the AWS environment fills the rest."""
    from fsspec.config import conf

    return dict(conf.get("s3", {}))


def _is_on(value: object) -> bool:
    """Settings from the environment may be words."""
    return value.strip().lower() not in _FALSE if isinstance(value, str) else bool(value)
