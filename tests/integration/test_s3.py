"""Runs that stream from a real S3 server over HTTP, with and without the aws command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.process import run_training, start_ranks
from tests.helpers.s3 import S3Server
from tests.helpers.shards import write_shards
from tests.integration.test_training import TINY, losses, run
from training.checkpoint_files import find_latest


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> S3Server:
    """Four shards of 64 samples under training/."""
    for path in write_shards(tmp_path_factory.mktemp("s3"), [64] * 4):
        s3_server.upload(path, f"training/{path.name}")
    return s3_server


FLAGS = ["--dataset-resampled", "--train-num-samples", "32", "--epochs", "1", "--workers", "1"]


@pytest.mark.slow
def test_a_run_streams_from_s3_directly_and_by_the_aws_command_alike(bucket: S3Server, tmp_path: Path) -> None:
    if shutil.which("aws") is None:
        pytest.skip("the aws command is not installed")
    url = bucket.url("training/shard-{00000..00003}.tar")
    assert run(tmp_path, url, *FLAGS, name="direct") == 0
    assert run(tmp_path, f"pipe:aws s3 cp {url} -", *FLAGS, name="pipe") == 0
    assert losses(tmp_path, "direct") == losses(tmp_path, "pipe")


@pytest.mark.parametrize(
    ("url", "message"),
    [("s3://no-such-bucket/{0..3}.tar", "no-such-bucket"), ("s3://clipyard-test/none-{0..3}.tar", "none-0.tar")],
)
def test_a_missing_bucket_or_key_gets_one_clear_line(
    bucket: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, url: str, message: str
) -> None:
    assert run(tmp_path, url, *FLAGS) == 2
    assert message in caplog.text


def test_missing_credentials_get_one_clear_line(bucket: S3Server, tmp_path: Path) -> None:
    """In a process of its own: clients of this one have seen credentials already."""
    env = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    url = bucket.url("training/shard-{00000..00003}.tar")
    done = run_training(*TINY, *FLAGS, "--train-data", url, "--logs", tmp_path, "--name", "x", env=env).expect(2)
    assert "error: " in done.output and "credentials" in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_a_bucket_that_vanishes_ends_all_ranks_with_the_last_checkpoint_whole(bucket: S3Server, tmp_path: Path) -> None:
    client = bucket.client()
    client.create_bucket(Bucket="vanishing")
    for path in write_shards(tmp_path / "many", [64] * 12):
        client.upload_file(str(path), "vanishing", path.name)
    flags = ["--train-data", "s3://vanishing/shard-{00000..00011}.tar", "--train-num-samples", "768"]
    flags += ["--dataset-resampled", "--shuffle-budget-mib", "1", "--logs", str(tmp_path / "logs"), "--name", "run"]
    flags += ["--epochs", "1000", "--save-frequency", "1000", "--save-every-n-steps", "10"]
    with start_ranks(2, *TINY, *flags) as ranks:
        ranks[0].wait_for(r"^saved .*step_000000010")
        for entry in client.list_objects_v2(Bucket="vanishing")["Contents"]:
            client.delete_object(Bucket="vanishing", Key=entry["Key"])
        client.delete_bucket(Bucket="vanishing")
        ended = [rank.finish(60).expect(1).output for rank in ranks]
    assert any("no such bucket: vanishing" in output for output in ended), ended
    assert "Traceback" not in "".join(ended)
    latest, passed_over = find_latest(tmp_path / "logs" / "run" / "checkpoints")
    assert latest is not None and passed_over == []
