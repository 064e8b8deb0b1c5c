"""The scripts around shards: what they print, write and refuse."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from data import StorageError, count_samples, expand_sources
from scripts import check_shards, index_shards, make_demo_shards
from tests.helpers.s3 import S3Server
from tests.helpers.shards import cut_tar, write_shards


def test_make_demo_shards_draws_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tmp_path / "d"), "--train=3", "--val=2", "--evaluation=2", "--shard=2", "--pixels=16"]
    assert make_demo_shards.main(command) == 0
    assert sorted(path.name for path in (tmp_path / "d" / "train").iterdir()) == [
        "00000.tar",
        "00001.tar",
        "sizes.json",
    ]
    assert make_demo_shards.main(command) == 0
    assert "is there already" in capsys.readouterr().out


def test_check_shards_tells_what_is_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, [4, 4], broken={1: "no_caption"})
    assert check_shards.main([f"{tmp_path}/shard-{{00000..00001}}.tar", "--model", "tiny-test"]) == 0
    output = capsys.readouterr().out
    assert "7 of 8 samples valid in 2 shards" in output
    assert "no_caption 1" in output


def test_check_shards_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_shards.main([f"{tmp_path}/none-{{0..2}}.tar"]) == 2
    assert capsys.readouterr().err.startswith("error: --train-data")


def test_check_shards_looks_at_as_many_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, [9, 0, 9, 9])
    assert check_shards.main([str(tmp_path), "--num-shards", "100", "--num-samples", "100"]) == 0
    out = capsys.readouterr().out
    assert "27 of 27 samples valid in 4 shards" in out
    assert "shard-00001.tar: holds no sample" in out


def test_index_shards_writes_the_counts_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "a", [4, 2])
    write_shards(tmp_path / "b", [3])
    assert index_shards.main([f"{tmp_path}/a::{tmp_path}/b"]) == 0
    assert json.loads((tmp_path / "a" / "sizes.json").read_text()) == {"shard-00000.tar": 4, "shard-00001.tar": 2}
    assert json.loads((tmp_path / "b" / "sizes.json").read_text()) == {"shard-00000.tar": 3}
    assert json.loads((tmp_path / "a" / "shard-00000_index.json").read_text())["samples"] == 4
    assert count_samples(expand_sources(f"{tmp_path}/a::{tmp_path}/b")) == (4, 2, 3)
    assert "6 samples in 2 shards" in capsys.readouterr().out


def test_index_shards_does_not_trust_or_replace_an_old_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, [4], sizes_json=True)
    (tmp_path / "sizes.json").write_text(json.dumps({"shard-00000.tar": 7, "elsewhere.tar": 1}))
    assert index_shards.main([str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert index_shards.main([str(tmp_path), "--overwrite"]) == 0
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"shard-00000.tar": 4, "elsewhere.tar": 1}


def test_index_shards_refuses_a_broken_tar_and_the_output_of_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_tar(write_shards(tmp_path, [4])[0])
    assert index_shards.main([str(tmp_path)]) == 2
    assert "cut short" in capsys.readouterr().err
    assert index_shards.main(["pipe:cat {0..1}.tar"]) == 2
    assert "name the object" in capsys.readouterr().err
    assert not (tmp_path / "sizes.json").exists()


def test_index_shards_takes_a_mixture_and_writes_for_everybody(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [3])
    mixture = tmp_path / "mix.yaml"
    entries = [{"name": name, "shards": f"{tmp_path}/{name}", "proportion": 1} for name in ("a", "b")]
    mixture.write_text(json.dumps(entries))
    earlier = os.umask(0o022)
    try:
        assert index_shards.main([str(mixture)]) == 0
    finally:
        os.umask(earlier)
    written = sorted(path for path in tmp_path.rglob("*.json"))
    assert [path.name for path in written] == ["shard-00000_index.json", "sizes.json"] * 2
    assert {path.stat().st_mode & 0o777 for path in written} == {0o644}


def test_index_shards_does_not_replace_what_it_could_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, [3], sizes_json=True)

    def away(url: str) -> bytes:
        raise StorageError(url, "no answer", "unreachable")

    monkeypatch.setattr(index_shards, "read_file", away)
    assert index_shards.main([str(tmp_path), "--overwrite"]) == 1
    assert "no answer" in capsys.readouterr().err


def test_an_index_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, [3])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert index_shards.main([str(tmp_path)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.tar"]


def test_index_shards_works_in_a_bucket(
    tmp_path: Path, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in write_shards(tmp_path, [4, 35]):
        s3_server.upload(path, f"index-shards/{path.name}")
    pattern = s3_server.url("index-shards/shard-{00000..00001}.tar")
    assert index_shards.main([pattern]) == 0
    assert "39 samples in 2 shards" in capsys.readouterr().out
    assert count_samples(expand_sources(pattern)) == (4, 35)
    assert len(json.loads(s3_server.read("index-shards/shard-00001_index.json"))["offsets"]) == 2
