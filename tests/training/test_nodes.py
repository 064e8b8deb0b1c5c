"""Run folders on a local disk of each node: ranks of one machine with folders of their own stand for nodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.gloo import run_ranks
from training.checkpoint_files import verify_checkpoint, write_checkpoint
from training.config import ClusterConfig
from training.distributed import session
from training.errors import ConfigError, PeerError
from training.manifest import read_manifest_text
from training.nodes import on_every_node, refuse_newer_elsewhere
from training.remote import Remote
from training.start import Fresh, Resume, StartState

# Each rank believes that it is alone on its node.
NODES = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
NAME = "step_000000007"


def write(run_dir: Path, step: int = 7) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step:09d}"
    write_checkpoint(folder, {}, {"a.json": [step]}, step=step, epoch=0, samples_seen=step)
    return folder


def _meet(root: Path, url: str | None) -> str:
    """What a rank ends with: the step in its own folder, or the error."""
    run_dir = root / f"node{os.environ['RANK']}" / "run"
    with session(ClusterConfig(device="cpu")) as world:
        chosen = world.broadcast_object(run_dir / "checkpoints" / NAME)
        try:
            folder = on_every_node(world, chosen, run_dir, None if url is None else Remote(url))
        except (ConfigError, PeerError) as error:
            return f"{type(error).__name__}: {error}"
        assert folder.parent == run_dir / "checkpoints"
        return f"step {verify_checkpoint(folder).step}"


def test_nodes_without_the_checkpoint_fetch_it_from_the_remote(tmp_path: Path) -> None:
    folder = write(tmp_path / "node0/run")
    Remote(f"{tmp_path}/away/run").upload(folder, read_manifest_text(folder) or "")
    assert run_ranks(_meet, 3, tmp_path, f"{tmp_path}/away/run", env=NODES) == ["step 7"] * 3
    text = read_manifest_text(folder)
    assert all(read_manifest_text(tmp_path / f"node{n}/run/checkpoints" / NAME) == text for n in (1, 2))


def test_what_the_last_upload_did_not_bring_is_brought_before_the_others_fetch_it(tmp_path: Path) -> None:
    write(tmp_path / "node0/run")
    assert run_ranks(_meet, 2, tmp_path, f"{tmp_path}/away/run", env=NODES) == ["step 7"] * 2


def test_another_checkpoint_of_the_same_name_does_not_pass_for_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "node0/run")
    other = write(tmp_path / "node1/run")
    assert read_manifest_text(other) != read_manifest_text(folder)  # they differ in when they were written
    assert run_ranks(_meet, 2, tmp_path, f"{tmp_path}/away/run", env=NODES) == ["step 7"] * 2
    assert read_manifest_text(other) == read_manifest_text(folder)


def test_without_a_remote_the_host_and_the_flag_are_named_on_every_rank(tmp_path: Path) -> None:
    write(tmp_path / "node0/run")
    for answer in run_ranks(_meet, 2, tmp_path, None, env=NODES):
        assert answer.startswith(f"ConfigError: {os.uname().nodename} cannot read ")
        assert "--logs must be on a file system that all nodes share" in answer and "--remote-sync" in answer


def test_ranks_of_one_node_ask_nobody(tmp_path: Path) -> None:
    write(tmp_path / "node0/run")
    answers = run_ranks(_one_node, 2, tmp_path / "node0/run")
    assert answers == [tmp_path / "node0/run/checkpoints" / NAME] * 2


def _one_node(run_dir: Path) -> Path:
    with session(ClusterConfig(device="cpu")) as world:
        return on_every_node(world, run_dir / "checkpoints" / NAME, run_dir, None)


def _look(root: Path, step: int | None, url: str | None) -> str:
    run_dir = root / f"node{os.environ['RANK']}" / "run"
    with session(ClusterConfig(device="cpu")) as world:
        folder = root / "node0/run/checkpoints" / f"step_{step or 0:09d}"
        start: StartState = Fresh("from the start") if step is None else Resume(folder, step, f"from step {step}")
        try:
            refuse_newer_elsewhere(world, start, run_dir, None if url is None else Remote(url))
        except (ConfigError, PeerError) as error:
            return str(error)
        return "fine"


@pytest.mark.parametrize("step", [None, 7])
def test_a_newer_checkpoint_on_another_node_s_disk_is_not_silently_left_behind(
    tmp_path: Path, step: int | None
) -> None:
    write(tmp_path / "node1/run", 9)
    if step is not None:
        write(tmp_path / "node0/run", step)
    for answer in run_ranks(_look, 2, tmp_path, step, None, env=NODES):
        assert "has step_000000009 in its own" in answer and "--logs must be shared by all nodes" in answer
    # With a remote, its newest is what counts.
    assert run_ranks(_look, 2, tmp_path, step, f"{tmp_path}/away", env=NODES) == ["fine"] * 2


def test_older_checkpoints_on_other_nodes_are_nobody_s_business(tmp_path: Path) -> None:
    write(tmp_path / "node0/run", 9)
    write(tmp_path / "node1/run", 7)
    assert run_ranks(_look, 2, tmp_path, 9, None, env=NODES) == ["fine"] * 2
