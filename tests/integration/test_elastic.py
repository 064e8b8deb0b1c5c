"""Runs under a torchrun that starts ranks again: after a kill, after a save, and on another number of nodes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.gloo import free_port, run_ranks
from tests.helpers.process import Running, poll
from tests.helpers.shards import write_shards
from tests.integration.test_training import TINY, assert_same_end, records
from training.main import main

RESUMED = ["--name", "run", "--resume", "latest", "--save-every-n-steps", "5"]


# Where agents share a store, a node that joins later waits for ever for an address that is told in the first round
# only (torch 2.14, DynamicRendezvousHandler.next_rendezvous).
JOINABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(*launch: str, flags: list[str], env: dict[str, str] | None = None) -> Running:
    """The real torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.2", *launch]
    return Running([*command, "-m", "training.main", "--", *flags], env)


def ranks_of(agent: Running) -> dict[int, int]:
    """RANK -> process of the ranks that an agent runs now; ranks lead sessions of their own."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        if parent == agent.process.pid and ranks:
            found[ranks[0]] = int(folder.name)
    return found


def kill_node(agent: Running) -> None:
    """A node that goes away: its agent first, so that nobody hears of its ranks' end."""
    ranks = ranks_of(agent)
    agent.kill()
    for process in ranks.values():
        os.kill(process, signal.SIGKILL)


def starts(agent: Running) -> int:
    return agent.output.count("start: ")


def on_rank(flags: list[str]) -> int:
    return main(flags)


@pytest.mark.slow
def test_after_a_kill_and_after_a_save_torchrun_goes_on_to_the_end_of_the_uninterrupted_run(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [16, 16, 16])
    flags = [*TINY, "--train-data", f"{tmp_path}/shards/shard-{{00000..00002}}.tar", "--epochs", "12", *RESUMED]
    flags += ["--batch-size", "4", "--save-frequency", "12"]
    assert run_ranks(on_rank, 2, [*flags, "--logs", str(tmp_path / "whole")], timeout_s=200) == [0, 0]
    ours = [*flags, "--logs-dir", str(tmp_path / "killed")]
    with torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=2", flags=ours) as agent:
        agent.wait_for(r"^step 8/")
        os.kill(ranks_of(agent)[1], signal.SIGKILL)
        poll(lambda: starts(agent) == 2, 120, "a second start", agent)
        poll(lambda: "\nstep " in agent.output.rsplit("start: ", 1)[1], 120, "a step of it", agent)
        os.kill(ranks_of(agent)[1], signal.SIGUSR1)  # all ranks save and end with 75, which is an end like any other
        done = agent.finish(200).expect(0)
    assert "start: no checkpoint in" in done.output and done.output.count("start: resuming from") == 2
    assert "stopped (signal SIGUSR1), everything is saved" in done.output or "stopped (as asked)" in done.output
    assert_same_end(tmp_path / "whole", tmp_path / "killed", "epoch_12")


@pytest.mark.slow
def test_nodes_may_join_and_leave_and_the_samples_stay_the_same(tmp_path: Path) -> None:
    """Two agents on this machine stand for two nodes. The first runs alone, with the second, and alone again."""
    shards, samples = 60, 60 * 16
    write_shards(tmp_path / "shards", [16] * shards)
    # Reading takes its time, so that nodes can come and go before the end.
    data = f"pipe:sleep 0.4; cat {tmp_path}/shards/shard-{{00000..{shards - 1:05d}}}.tar"
    flags = [*TINY, "--train-data", data, "--train-num-samples", str(samples), "--epochs", "1", "--batch-size", "4"]
    flags += [*RESUMED, "--logs-dir", str(tmp_path), "--dist-timeout-s", "20", "--no-preflight", "--dataset-resampled"]
    launch = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
    launch += [f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    launch += ["--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"]
    with torchrun(*launch, flags=flags, env=JOINABLE) as first:
        first.wait_for(r"^step 3/")
        with torchrun(*launch, flags=flags, env=JOINABLE) as second:
            poll(lambda: has_stepped_as_two(first) or has_stepped_as_two(second), 120, "steps of two", first)
            kill_node(second)
        done = first.finish(200).expect(0)
    assert done.output.count("start: ") >= 2
    last = records(tmp_path)[-1]
    assert (last["epoch"], last["samples_seen"]) == (1, samples)


def has_stepped_as_two(agent: Running) -> bool:
    """A step has been made since two nodes met; the agent of rank 0 shows it."""
    _, *after = agent.output.rsplit("2 ranks by torchrun on", 1)
    return bool(after) and "\nstep " in after[0]
