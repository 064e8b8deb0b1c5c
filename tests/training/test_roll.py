"""What the roll call says of those who came: the usual mistakes, each with a readable answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.roll import Card, Expected, Roll, judge

A100 = "NVIDIA A100-SXM4-40GB"
VERSIONS = {"torch": "2.8.0", "CUDA": "12.8", "NCCL": "2.27.3", "Python": "3.12", "timm": "1.0.19", "clipyard": "0.1.0"}


def cards(hosts: int = 2, per_host: int = 4, **changes: object) -> list[Card]:
    """What the ranks of whole nodes hand in."""
    found = [
        Card(
            rank=host * per_host + local,
            size=hosts * per_host,
            host=f"a0{host + 1}",
            pid=1000 + local,
            local_rank=local,
            launcher="srun",
            job="4711.0",
            device=A100,
            gpu=f"GPU-{host}-{local}",
            visible_gpus=per_host,
            versions=VERSIONS,
            settings="same",
        )
        for host in range(hosts)
        for local in range(per_host)
    ]
    return [replace(card, **changes) for card in found]


def verdict(came: list[Card], size: int = 8, **expected: object) -> Roll:
    """Of rank 0, which expects nodes a01 and a02."""
    known = Expected(size, 120.0, "a01:12345", nodes=("a01", "a02"))
    settings = {
        "same": {"lr": ("0.001", "x"), "train_data": ("s3://***@bucket", "y")},
        "other": {"lr": ("0.01", "z"), "train_data": ("s3://***@bucket", "y")},
        "secret": {"lr": ("0.001", "x"), "train_data": ("s3://***@bucket", "w")},
    }
    return judge(came, replace(known, **expected), settings.__getitem__)


def test_when_all_came_one_line_says_who() -> None:
    roll = verdict(cards()[::-1])
    assert (roll.error, roll.warnings) == ("", ())
    assert roll.summary == (
        f"8 ranks by srun on 2 hosts (4 on each of a01, a02), {A100}; torch 2.8.0, CUDA 12.8, NCCL 2.27.3, "
        "Python 3.12, timm 1.0.19, clipyard 0.1.0"
    )


def test_mixed_gpus_are_counted() -> None:
    came = [replace(card, device="H100") if card.host == "a02" else card for card in cards()]
    assert f"4 x {A100}, 4 x H100" in verdict(came).summary


def test_a_node_of_which_nobody_came_is_named() -> None:
    assert verdict(cards()[:4]).error == (
        "4 of 8 ranks came within 120 s, 4 on a01; missing: 4, 5, 6, 7. Nobody came from a02: did the program start "
        "there, and can these nodes reach rank 0 at a01:12345 (firewall, interface)?"
    )


def test_missing_ranks_of_all_nodes_point_to_the_number_of_tasks() -> None:
    came = [card for card in cards() if card.local_rank < 3]
    assert "6 of 8 ranks came within 120 s, 3 on each of a01, a02; missing: 3, 7. Likely: fewer tasks" in (
        verdict(came).error
    )


def test_a_rank_0_that_is_not_where_the_others_look_says_so() -> None:
    remark = "the others look for rank 0 on a09, and it is on a01"
    assert verdict(cards()[:1], remark=remark).error.endswith(f"Likely: {remark}")


def test_a_doubled_rank_is_told_with_both_processes() -> None:
    came = cards()
    came[7] = replace(came[7], rank=3)
    assert verdict(came).error == (
        "rank 3 was started 2 times: process 1003 on a01 of job 4711.0 and process 1003 on a02 of job 4711.0. Likely: "
        "two runs share MASTER_ADDR and MASTER_PORT, or RANK is exported alike for several tasks"
    )


def test_all_ranks_doubled_are_two_runs() -> None:
    came = cards(1) + cards(1, job="4712.0")
    error = verdict(came, size=4).error
    assert "(and so were 3 more ranks)" in error and error.endswith(
        "Likely: two runs share MASTER_ADDR and MASTER_PORT"
    )


def test_different_world_sizes_are_told_before_what_follows_from_them() -> None:
    came = [replace(card, size=4) if card.host == "a02" else card for card in cards()][:6]
    assert "ranks differ in world size: 8 on ranks 0, 1, 2, 3, 4 on ranks 4, 5" in verdict(came).error


@pytest.mark.parametrize("name", list(VERSIONS))
def test_versions_that_differ_are_named_with_their_ranks(name: str) -> None:
    came = cards()
    came[6] = replace(came[6], versions=VERSIONS | {name: "9.9"})
    error = verdict(came).error
    assert error.startswith(f"ranks differ in the version of {name}: {VERSIONS[name]} on ranks 0, 1, 2, 3 and 3 more, ")
    assert "9.9 on rank 6" in error


def test_two_ranks_on_one_gpu_are_refused_with_the_numbers_of_the_node() -> None:
    came = [replace(card, gpu="GPU-0", visible_gpus=1) if card.host == "a02" else card for card in cards()]
    assert f"ranks 4, 5, 6, 7 on a02 have one GPU ({A100}, GPU-0) in common; 4 ranks use 1 GPUs there" in (
        verdict(came).error
    )


def test_cpus_are_shared() -> None:
    assert not verdict(cards(gpu="", device="cpu", visible_gpus=0)).error


def test_fewer_ranks_than_gpus_are_a_warning() -> None:
    roll = verdict(cards(visible_gpus=8))
    assert not roll.error
    assert roll.warnings[0].startswith("a01 (and 1 more hosts) has 8 GPUs and 4 ranks: the others idle.")


def test_a_rank_without_its_device_stops_all_with_its_reason() -> None:
    came = cards()
    came[5] = replace(came[5], problem="--device cuda, but no GPU is visible")
    assert verdict(came).error == "rank 5 on a02: --device cuda, but no GPU is visible"


def test_the_first_setting_that_differs_is_named() -> None:
    came = [replace(card, settings="other") if card.rank == 2 else card for card in cards()]
    assert verdict(came).error.startswith(
        "ranks were started with different settings: --lr is 0.001 on ranks 0, 1, 3, 4 and 3 more and 0.01 on rank 2;"
    )


def test_a_difference_in_a_secret_is_told_without_it() -> None:
    came = [replace(card, settings="secret") if card.rank == 2 else card for card in cards()]
    error = verdict(came).error
    assert "--train-data is on ranks 0, 1, 3, 4 and 3 more and rank 2 in what is masked as secret" in error
    assert "bucket" not in error
