"""Whole runs with a second copy at a remote: folders lost, buckets lost, jobs that end."""

from __future__ import annotations

import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.gloo import run_ranks
from tests.helpers.process import poll, run_training, start_training
from tests.helpers.s3 import S3Server, serve_s3
from tests.helpers.shards import write_shards
from tests.integration.test_nonfinite import run as poisoned
from tests.integration.test_training import TINY, assert_same_end, losses, records, run
from training.checkpoint_files import find_latest, list_checkpoints
from training.main import main
from training.remote import Remote

SAVE = ("--save-every-n-steps", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of 16 samples: 6 steps an epoch."""
    folder = tmp_path_factory.mktemp("remote-sync")
    write_shards(folder, [16, 16, 16])
    return f"{folder}/shard-{{00000..00002}}.tar"


@pytest.fixture(scope="module")
def uninterrupted(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs folder of a whole run without a remote."""
    logs = tmp_path_factory.mktemp("uninterrupted")
    assert run(logs, data) == 0
    return logs


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[S3Server]:
    """A bucket of this test's own, on the server of the session."""
    server = replace(s3_server, bucket=f"sync-{uuid.uuid4().hex}")
    server.client().create_bucket(Bucket=server.bucket)
    yield server
    empty(server)


def empty(server: S3Server) -> None:
    for key in server.keys(prefix=""):
        server.delete(key)


def whole(url: str) -> list[str]:
    """Checkpoints that a reader takes."""
    return [name for name, text in Remote(url).manifests().items() if text is not None]


@pytest.mark.slow
def test_a_run_whose_folder_was_lost_goes_on_from_the_bucket_bitwise_and_with_complete_curves(
    bucket: S3Server, uninterrupted: Path, data: str, tmp_path: Path
) -> None:
    sync = ("--remote-sync", bucket.url("runs"), *SAVE)
    assert run(tmp_path, data, *sync, "--stop-after-steps", "9") == 75
    assert whole(bucket.url("runs/run"))[-1] == "step_000000009"
    shutil.rmtree(tmp_path / "run")
    assert run(tmp_path, data, *sync, "--resume", "latest") == 0
    assert_same_end(uninterrupted, tmp_path)
    steps = [record["step"] for record in records(tmp_path) if "train/loss" in record]
    assert steps == list(range(1, 13))
    log = (tmp_path / "run/train.log").read_text()
    assert f"fetched from {bucket.url('runs/run/checkpoints/step_000000009')}" in log
    assert log.rstrip().endswith("done")
    # The bucket has what the folder has.
    folder = tmp_path / "run"
    assert bucket.read("runs/run/metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()
    assert bucket.read("runs/run/config.yaml") == (folder / "config.yaml").read_bytes()
    assert {"epoch_1", "epoch_2"} <= set(whole(bucket.url("runs/run")))


@pytest.mark.slow
def test_a_killed_run_on_a_new_machine_goes_on_from_what_had_reached_the_bucket(
    bucket: S3Server, uninterrupted: Path, data: str, tmp_path: Path
) -> None:
    flags = [*TINY, "--train-data", data, "--name", "run", "--remote-sync", bucket.url("runs"), *SAVE]
    with start_training(*flags, "--logs", tmp_path / "first") as running:
        running.wait_for(r"^uploaded (step_000000004|epoch_1)")
        running.kill()
    assert run_training(*flags, "--logs", tmp_path / "second", "--resume", "latest").returncode == 0
    assert_same_end(uninterrupted, tmp_path / "second")


@pytest.mark.slow
def test_a_bucket_that_vanishes_during_the_run_warns_once_and_costs_nothing_else(
    uninterrupted: Path, data: str, tmp_path: Path
) -> None:
    with serve_s3() as server:
        flags = [*TINY, "--train-data", data, "--logs", tmp_path, "--name", "run", "--remote-sync", server.url("runs")]
        with start_training(*flags, *SAVE, "--workers", "1", env=server.env) as running:
            running.wait_for(r"^uploaded ")
            running.signal(signal.SIGSTOP)  # the run would be over before the bucket is
            poll(lambda: _delete_bucket(server), 60, "the end of the bucket")
            running.signal(signal.SIGCONT)
            done = running.finish().expect(0)
    assert_same_end(uninterrupted, tmp_path)
    warnings = [line for line in done.output.splitlines() if "the run goes on" in line]
    assert len(warnings) == 1 and "bucket" in warnings[0], done.output
    last = done.output.splitlines()[-1]
    assert last.startswith(f"done; not brought to {server.url('runs/run')}: epoch_2") and "metrics.jsonl" in last
    assert "Traceback" not in done.output


def _delete_bucket(server: S3Server) -> bool:
    """Whether it is gone; an upload may put an object in between."""
    try:
        empty(server)
        server.client().delete_bucket(Bucket=server.bucket)
    except Exception:
        return False
    return True


@pytest.mark.slow
def test_a_preempted_run_ends_in_time_though_its_upload_hangs(data: str, tmp_path: Path) -> None:
    """The server accepts connections and never answers again: it is stopped, as a machine that has died."""
    with serve_s3() as server:
        flags = [*TINY, "--train-data", data, "--logs", tmp_path, "--name", "run", "--remote-sync", server.url("runs")]
        env = server.env | {"CLIPYARD_END_TIME": str(time.time() + 45)}
        with start_training(*flags, "--epochs", "100000", *SAVE, env=env) as running:
            running.wait_for(r"^uploaded ", 40)
            _stop(server)
            done = running.finish(120).expect(75)
            assert time.time() < float(env["CLIPYARD_END_TIME"])
    newest, passed_over = find_latest(tmp_path / "run/checkpoints")
    assert newest is not None and not passed_over
    last = done.output.splitlines()[-1]
    assert "everything is saved; not brought to s3://" in last and newest.name in last
    assert "Traceback" not in done.output


def _stop(server: S3Server) -> None:
    port = server.endpoint_url.rsplit(":", 1)[1]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"moto.server" in command and port.encode() in command:
            os.kill(int(process.name), signal.SIGSTOP)


def on_node(root: Path, flags: list[str]) -> int:
    """A rank that is alone on its node, whose run folders are on a disk of its own."""
    torch.set_num_threads(1)
    return main([*flags, "--logs", str(root / f"node{os.environ['RANK']}")])


@pytest.mark.slow
def test_nodes_with_disks_of_their_own_go_on_from_the_remote_and_stop_with_one_line_without_it(
    data: str, tmp_path: Path
) -> None:
    flags = [*TINY, "--train-data", data, "--name", "run", "--batch-size", "4", "--resume", "latest"]
    sync = ["--remote-sync", f"{tmp_path}/away"]
    nodes = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    stopped = [*flags, *sync, "--stop-after-steps", "4"]
    assert run_ranks(on_node, 2, tmp_path, stopped, timeout_s=200, env=nodes) == [75, 75]
    assert not (tmp_path / "node1").exists()
    assert run_ranks(on_node, 2, tmp_path, flags, timeout_s=200, env=nodes) == [2, 2]
    assert run_ranks(on_node, 2, tmp_path, [*flags, *sync], timeout_s=200, env=nodes) == [0, 0]
    assert [path.name for path in (tmp_path / "node1/run/checkpoints").iterdir()] == ["step_000000004"]
    assert sorted(losses(tmp_path / "node0")) == list(range(1, 13))


@pytest.mark.slow
def test_a_rollback_is_the_same_at_the_remote(data: str, tmp_path: Path) -> None:
    sync = ("--remote-sync", f"{tmp_path}/away")
    flags = ("--batch-size", "8", "--on-nonfinite", "rollback", "--max-nonfinite", "1", "--keep-last", "9", *SAVE)
    poisoned(tmp_path, data, *flags, *sync, "--stop-after-steps", "9", batches={6, 7}, ranks=1)
    local = {
        folder.name: (folder / "manifest.json").read_text() for folder in list_checkpoints(tmp_path / "run/checkpoints")
    }
    there = Remote(f"{tmp_path}/away/run").manifests()
    assert there and all(local[name] == text for name, text in there.items())


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--remote-sync", "s3://nobody-has-this-bucket/x"), 2, "the specified bucket does not exist"),
        (("--remote-sync", "nosuch://x"), 2, "protocol not known: nosuch"),
        (("--remote-sync", "s3://clipyard-test/x", "--remote-sync-frequency", "0"), 2, "must be positive"),
        (("--resume", "s3://clipyard-test/runs/epoch_77"), 2, "has no manifest.json"),
    ],
)
def test_what_cannot_be_copied_to_or_fetched_ends_with_one_line_before_any_training(
    s3_server: S3Server,
    data: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    flags: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    assert run(tmp_path, data, *flags) == code
    assert message in caplog.text.lower() and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_remote_that_does_not_answer_stops_a_new_run_and_not_one_that_has_checkpoints(
    uninterrupted: Path, data: str, tmp_path: Path
) -> None:
    with serve_s3() as server:
        env = server.env | {"AWS_MAX_ATTEMPTS": "1"}  # s3fs insists besides
    sync = ("--remote-sync", server.url("runs"), *SAVE)
    flags = [*TINY, "--train-data", data, "--logs", tmp_path, "--name", "run", "--resume", "latest", *sync]
    done = run_training(*flags, env=env).expect(1)
    assert "nobody knows how far the run has come" in done.output and "Traceback" not in done.output
    assert run(tmp_path, data, "--stop-after-steps", "4") == 75
    done = run_training(*flags, env=env, timeout_s=400).expect(0)
    assert "there may be a newer one: --remote-sync: " in done.output
    assert_same_end(uninterrupted, tmp_path)
    assert sorted(losses(tmp_path)) == list(range(1, 13))
