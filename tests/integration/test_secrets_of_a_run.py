"""Credentials in what a user types must not be found in anything that a run leaves behind or says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.process import run_training
from tests.helpers.s3 import S3Server
from tests.helpers.shards import write_shards
from tests.integration.test_training import TINY

BEARER, SIGNED, KEY, TOKEN = "hunter2bearer", "5igned5ignature", "w4ndbkey" * 5, "s3ss10nt0ken"
SECRETS = (BEARER, SIGNED, KEY, TOKEN, "testing-secret")


def assert_nowhere(folder: Path, output: str) -> None:
    """None of the secrets is in the output or in a file below `folder`, bytes of checkpoints and trackers included."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "train.log", "manifest.json"} <= {path.name for path in files}
    for secret in SECRETS:
        assert secret not in output
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_secrets_of_urls_commands_and_environment_are_in_no_log_dump_checkpoint_or_tracker(
    s3_server: S3Server, tmp_path: Path
) -> None:
    for path in write_shards(tmp_path / "shards", [16, 16, 0]):
        s3_server.upload(path, f"secrets/{path.name}")
    signed = s3_server.client().generate_presigned_url(
        "get_object", {"Bucket": s3_server.bucket, "Key": "secrets/shard-00000.tar"}
    )
    signed = signed.replace("http://", f"http://reader:{BEARER}@") + f"&X-Amz-Security-Token={TOKEN}"
    command = (
        f"pipe:AWS_SECRET_ACCESS_KEY={SIGNED} true; : -H 'Authorization: Bearer {BEARER}'; "
        f"cat {tmp_path}/shards/shard-0000{{1..4}}.tar"  # of which two do not exist
    )
    flags = ["--train-data", f"{signed}::{command}", "--train-num-samples", "32", "--dataset-resampled"]
    flags += ["--max-skip-fraction", "1", "--logs", str(tmp_path / "logs"), "--name", "run", "--report-to", "all"]
    env = s3_server.env | {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "AWS_SESSION_TOKEN": TOKEN}
    ended = run_training(*TINY, *flags, "--wandb-notes", f"token={TOKEN}", env=env).expect(0)
    assert_nowhere(tmp_path / "logs" / "run", ended.output)
    missing = signed.replace("shard-00000", "shard-00009")
    broken = run_training(*TINY, *flags, "--train-data", missing, "--name", "other", env=env).expect(2)
    assert "secrets/shard-00009.tar" in broken.output
    assert all(secret not in broken.output for secret in SECRETS)
