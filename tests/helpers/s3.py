"""An S3 server on this machine, over HTTP, as a process of its own. Knows buckets, not shards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.gloo import free_port
from tests.helpers.process import Running

BUCKET = "clipyard-test"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class S3Server:
    """A running server with one empty bucket. `env` is what a client's environment needs."""

    endpoint_url: str
    bucket: str = BUCKET

    @property
    def env(self) -> dict[str, str]:
        """AWS_ENDPOINT_URL, credentials and region."""
        return {"AWS_ENDPOINT_URL": self.endpoint_url, **CREDENTIALS}

    def client(self) -> Any:
        """A boto3 client."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
        )

    def url(self, key: str) -> str:
        """`s3://bucket/key`"""
        return f"s3://{self.bucket}/{key}"

    def upload(self, content: bytes | str | Path, key: str) -> str:
        """Stores bytes, or the file at a path, under `key`; returns its URL."""
        body = content if isinstance(content, bytes) else Path(content).read_bytes()
        self.client().put_object(Bucket=self.bucket, Key=key, Body=body)
        return self.url(key)

    def read(self, key: str) -> bytes:
        """The object's content."""
        return bytes(self.client().get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def keys(self, prefix: str = "") -> list[str]:
        """The keys below `prefix`, in order (the first thousand)."""
        listed = self.client().list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for entry in listed.get("Contents", [])]

    def delete(self, key: str) -> None:
        """Removes an object."""
        self.client().delete_object(Bucket=self.bucket, Key=key)


@contextmanager
def serve_s3(timeout_s: float = 60.0) -> Iterator[S3Server]:
    """Starts moto's server on a free port of 127.0.0.1, makes the bucket, and ends the server on leaving."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with Running(command) as running:
        running.wait_for(r"Running on http", timeout_s)
        server = S3Server(f"http://127.0.0.1:{port}")
        server.client().create_bucket(Bucket=server.bucket)
        yield server


def without_aws_account(folder: Path) -> dict[str, str]:
    """Settings under which no client finds the developer's own account, nor asks the metadata address for one."""
    return {
        "AWS_CONFIG_FILE": str(folder / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-aws-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
