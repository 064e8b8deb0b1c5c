from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.sizes import count_samples, total_samples
from data.urls import Source, expand_sources
from tests.helpers.s3 import S3Server
from tests.helpers.shards import cut_tar

Shards = Callable[..., list[Path]]


def test_local_tars_are_counted_by_their_headers(shards: Shards) -> None:
    folder = shards([3, 1, 0, 12])[0].parent
    assert count_samples(expand_sources(str(folder))) == (3, 1, 0, 12)
    assert total_samples(expand_sources(str(folder))) == 16


def test_sizes_json_is_believed_over_the_tar(shards: Shards) -> None:
    paths = shards([2, 2], sizes_json=True)
    (paths[0].parent / "sizes.json").write_text(json.dumps({"shard-00000.tar": 7, "other.tar": 1}))
    assert count_samples(expand_sources(str(paths[0].parent))) == (7, 2)


def test_the_statistics_of_img2dataset_are_understood(shards: Shards) -> None:
    paths = shards([2, 2])
    (paths[1].parent / "shard-00001_stats.json").write_text(
        json.dumps({"count": 10, "successes": 8, "failed_to_download": 2})
    )
    assert count_samples(expand_sources(str(paths[0].parent))) == (2, 8)


def test_counts_follow_the_sources_in_their_order_even_if_a_shard_comes_twice(shards: Shards) -> None:
    first, second = shards([2, 5])
    assert count_samples(expand_sources(f"{second}::{first}::{second}")) == (5, 2, 5)


def test_a_tar_that_cannot_be_walked_leaves_the_counts_unknown(shards: Shards) -> None:
    paths = shards([2, 2])
    cut_tar(paths[1])
    assert count_samples(expand_sources(str(paths[0].parent))) is None


def test_an_index_that_is_no_json_is_passed_over(shards: Shards) -> None:
    paths = shards([2, 3])
    (paths[0].parent / "sizes.json").write_text("{broken")
    (paths[0].parent / "shard-00000_stats.json").write_text("[1]")
    assert count_samples(expand_sources(str(paths[0].parent))) == (2, 3)


def test_a_pipe_has_no_counts() -> None:
    assert count_samples([Source("p", ("pipe:cat a.tar",))]) is None
    assert total_samples([Source("p", ("pipe:cat a.tar",))]) is None


def test_the_total_may_stand_in_a_len_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar")
    (tmp_path / "__len__").write_text("123\n")
    assert count_samples(expand_sources(str(tmp_path))) is None
    assert total_samples(expand_sources(str(tmp_path))) == 123


@pytest.mark.parametrize("index", ["sizes.json", "stats", "none"])
def test_remote_shards_are_counted_by_an_index_or_not_at_all(s3_server: S3Server, shards: Shards, index: str) -> None:
    prefix = f"sizes-{index}"
    for number, path in enumerate(shards([2, 3])):
        s3_server.upload(path, f"{prefix}/{number:05d}.tar")
        if index == "stats":
            s3_server.upload(json.dumps({"successes": number + 2}).encode(), f"{prefix}/{number:05d}_stats.json")
    if index == "sizes.json":
        s3_server.upload(json.dumps({"00000.tar": 2, "00001.tar": 3}).encode(), f"{prefix}/sizes.json")
    expected = None if index == "none" else (2, 3)
    assert count_samples(expand_sources(s3_server.url(prefix + "/{00000..00001}.tar"))) == expected
