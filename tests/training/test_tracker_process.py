from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.process import poll, run_training, start_training
from tests.helpers.shards import write_shards
from tests.integration.test_training import TINY
from training.sinks import SinkSettings, SinkThread, Trackers
from training.tracker_process import WandbProcess

pytestmark = pytest.mark.slow


def record(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "samples_seen": step * 8, "time": 1e9 + step, "loss": 1 / step}


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def flags(folder: Path) -> list[str]:
    write_shards(folder / "shards", [16])
    data = ["--train-data", f"{folder}/shards/shard-00000.tar", "--logs", str(folder / "logs"), "--name", "run"]
    return [*TINY, *data, "--report-to", "wandb"]


def steps_written(folder: Path) -> int:
    return (folder / "logs" / "run" / "metrics.jsonl").read_text().count("train/loss")


def test_a_run_is_neither_held_up_nor_kept_from_ending_by_a_tracker_that_never_answers(
    tmp_path: Path, silent_server: str
) -> None:
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": silent_server}
    output = run_training(*flags(tmp_path), env=env).expect(0).output
    assert output.count("tracker wandb dropped, the run goes on without it") == 1
    assert "Traceback" not in output and "a" * 40 not in output
    assert steps_written(tmp_path) == 4


def test_a_tracker_that_is_killed_is_dropped_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sinks: list[WandbProcess] = []

    def build() -> WandbProcess:
        sinks.append(WandbProcess(SinkSettings(tmp_path, "run", wandb_run_id="abcd1234")))
        return sinks[0]

    thread = SinkThread("wandb", build)
    thread.write(record(1))
    poll(lambda: list(tmp_path.glob("wandb/offline-run-*/*.wandb")), 60, "W&B's file")
    os.kill(sinks[0]._process.pid, signal.SIGKILL)
    sinks[0]._process.wait()
    for step in range(2, 9):
        thread.write(record(step))
    Trackers([thread]).close()
    assert thread.dropped
    assert [entry.getMessage() for entry in caplog.records if "ended with -9" in entry.getMessage()]
    assert len(caplog.records) == 1


def test_the_tracker_outlives_the_signals_of_a_preemption_and_the_resumed_run_is_the_same_to_it(tmp_path: Path) -> None:
    with start_training(*flags(tmp_path), "--epochs", "2000", env={"WANDB_MODE": "offline"}) as running:
        running.wait_for(r"^step 5/")
        poll(lambda: list(tmp_path.glob("logs/run/wandb/offline-run-*/*.wandb")), 60, "W&B's file", running)
        tracker = poll(lambda: _child(running.process.pid, "training.tracker_process"), 10, "the tracker", running)
        os.kill(tracker, signal.SIGTERM)
        os.kill(tracker, signal.SIGUSR2)
        running.signal(signal.SIGTERM, group=True)
        output = running.finish().expect(75).output
    assert "dropped" not in output
    last = max(int(line.split("/")[0].removeprefix("step ")) for line in output.splitlines() if line[:5] == "step ")
    content = next(tmp_path.glob("logs/run/wandb/offline-run-*/*.wandb")).read_bytes()
    assert re.search(rb"samples_seen[^0-9]{1,8}%d[^0-9]" % (last * 8), content)

    again = [*flags(tmp_path), "--epochs", "2000", "--resume", "latest", "--stop-after-steps", str(last + 3)]
    run_training(*again, env={"WANDB_MODE": "offline"}).expect(75)
    runs = [path.name.rsplit("-", 1)[1] for path in tmp_path.glob("logs/run/wandb/offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1, "the run's id comes from the checkpoint"


def test_the_tracker_of_a_killed_run_ends_too(tmp_path: Path) -> None:
    with start_training(*flags(tmp_path), "--epochs", "2000", env={"WANDB_MODE": "offline"}) as running:
        running.wait_for(r"^step 5/")
        tracker = poll(lambda: _child(running.process.pid, "training.tracker_process"), 10, "the tracker", running)
        running.process.kill()
        running.process.wait()
        poll(lambda: not _is_running(tracker), 60, "the end of the tracker")


def _child(parent: int, module: str) -> int | None:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
            if is_child and module in (path / "cmdline").read_text():
                return int(path.name)
        except (OSError, IndexError):
            continue
    return None


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
