"""The roll call between real processes: one verdict for all, also in a store that an earlier start has used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.errors import ConfigError
from tests.helpers.gloo import free_port, run_ranks
from tests.helpers.process import poll
from training.config import ClusterConfig
from training.distributed import session
from training.rollcall import digest, shown, versions


def _join(changes: dict[int, dict[str, str]], settings: dict[int, dict[str, object]], timeout_s: float = 30.0) -> str:
    """By process: changes of the environment, and settings. Who came, or what was wrong."""
    process = int(os.environ["RANK"])
    os.environ.update(changes.get(process, {}))
    cluster = ClusterConfig(device=os.environ.get("DEVICE", "cpu"), rendezvous_timeout_s=timeout_s)
    try:
        with session(cluster, settings.get(process, {"lr": 1e-3, "wd": 0.2})) as world:
            return f"{world.max_int(world.rank)} {world.roll.summary}"
    except ConfigError as error:
        return f"refused: {error}"


def test_all_ranks_learn_who_came() -> None:
    said = run_ranks(_join, 3, {}, {})
    assert len(set(said)) == 1
    assert said[0].startswith("2 3 ranks by environment on ")
    assert f"torch {torch.__version__}" in said[0]


def test_a_doubled_rank_is_told_to_all() -> None:
    said = run_ranks(_join, 3, {2: {"RANK": "1"}}, {})
    assert len(set(said)) == 1
    assert said[0].startswith("refused: rank 1 was started 2 times: process ")


def _join_and_stay(folder: Path, rank_of: dict[int, str]) -> str:
    """As `_join`, in a world of two; nobody leaves before each of three processes has its verdict."""
    process = int(os.environ["RANK"])
    os.environ.update(RANK=rank_of[process], WORLD_SIZE="2")
    try:
        with session(ClusterConfig(device="cpu", rendezvous_timeout_s=30.0)) as world:
            (folder / f"{process}").touch()
            poll(lambda: len(list(folder.iterdir())) == 3, 50, "verdicts")
            return f"{world.max_int(world.rank)} {world.roll.summary}"
    except ConfigError as error:
        (folder / f"{process}").touch()
        return f"refused: {error}"


def test_a_rank_that_comes_when_all_are_there_is_sent_away(tmp_path: Path) -> None:
    """Three processes for two ranks: whoever is third is in the verdict or too late for it."""
    said = run_ranks(_join_and_stay, 3, tmp_path, {0: "0", 1: "1", 2: "1"})
    refused = [line for line in said if line.startswith("refused: ")]
    assert refused and all("was started 2 times" in line or "are complete without it" in line for line in refused)


def test_different_settings_are_told_to_all_by_name() -> None:
    said = run_ranks(_join, 2, {}, {1: {"lr": 1e-3, "wd": 0.1}})
    assert len(set(said)) == 1
    assert "--wd is 0.2 on rank 0 and 0.1 on rank 1; all ranks need the same command" in said[0]


def test_a_rank_without_its_device_is_told_to_all() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = run_ranks(_join, 2, {1: {"DEVICE": "cuda"}}, {})
    assert len(set(said)) == 1
    assert said[0].startswith("refused: rank 1 on ") and "no GPU is visible" in said[0]


def test_different_world_sizes_are_told_to_all() -> None:
    said = run_ranks(_join, 2, {1: {"WORLD_SIZE": "3"}}, {})
    assert len(set(said)) == 1
    assert "ranks differ in world size: 2 on rank 0, 3 on rank 1" in said[0]


def test_without_rank_0_the_others_end_within_the_limit() -> None:
    (said,) = run_ranks(_join, 1, {0: {"RANK": "1", "WORLD_SIZE": "2"}}, {}, 2.0)
    assert said.startswith("refused: rank 1 on ") and "nobody listens there (connection refused)" in said


@pytest.fixture
def agents_store() -> Iterator[dict[str, str]]:
    """A store that outlives the ranks, as torchrun's agent keeps one, and the environment of ranks that use it."""
    port = free_port()
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60), use_libuv=True
    )
    yield {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    del store


def test_a_store_of_an_earlier_start_serves_the_next_one_of_any_size(agents_store: dict[str, str]) -> None:
    """Agents may count restarts differently: nothing in the environment tells one start from the next."""
    for size in (3, 2, 3):
        said = run_ranks(_join, size, {}, {}, env=agents_store)
        assert len(set(said)) == 1 and said[0].startswith(f"{size - 1} {size} ranks by torchrun")


def test_a_roll_call_that_never_ended_does_not_disturb_the_next_one(agents_store: dict[str, str]) -> None:
    (said,) = run_ranks(_join, 1, {}, {}, 1.0, env=agents_store | {"WORLD_SIZE": "2"})
    assert "1 of 2 ranks came" in said
    said = run_ranks(_join, 2, {}, {}, env=agents_store)
    assert len(set(said)) == 1 and said[0].startswith("1 2 ranks")


def test_a_rank_alone_in_the_store_of_an_earlier_start_ends_within_the_limit(agents_store: dict[str, str]) -> None:
    run_ranks(_join, 2, {}, {}, env=agents_store)
    (said,) = run_ranks(_join, 1, {0: {"RANK": "1", "WORLD_SIZE": "2"}}, {}, 1.0, env=agents_store)
    assert "a store answers at rank 0's address, but no word from rank 0 within 1 s" in said


def test_values_tell_settings_apart_and_secrets_stay_hidden() -> None:
    settings = {"train_data": "https://me:word@host/a.tar", "lr": 1e-3}
    assert shown(settings)["train_data"] == ("https://***@host/a.tar", digest("https://me:word@host/a.tar"))
    assert digest({"lr": 1e-3}) != digest({"lr": 1e-4})


def test_versions_of_libraries_on_the_gpu_matter_on_gpus_only() -> None:
    assert list(versions(on_gpu=False)) == ["torch", "Python", "timm", "clipyard"]
