from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data.augment import AugmentConfig
from data.captions import CaptionConfig
from data.errors import DataConfigError
from data.preflight import PreflightReport, preflight
from data.prepare import Preparer
from data.readers import TarReader
from data.urls import expand_sources
from data.where import Filter, Where
from tests.helpers.s3 import S3Server
from tests.helpers.shards import BREAKAGES

Shards = Callable[..., list[Path]]


@dataclass(frozen=True)
class Config:
    image_size: tuple[int, int] = (16, 16)
    interpolation: str = "bicubic"
    aug: AugmentConfig = AugmentConfig()
    captions: CaptionConfig = CaptionConfig()
    max_image_pixels: int = 10**6
    image_decode: str = "exact"


class WordTokenizer:
    """A token a word between start and end, context of 6."""

    def encode(self, text: str) -> list[int]:
        return [1 + len(word) for word in text.split()]

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [[*[98, *self.encode(text)][:5], 99] for text in texts]
        return torch.tensor([row + [0] * (6 - len(row)) for row in rows])


def look(
    train_data: str,
    caption_key: str = "txt",
    more_keys: tuple[str, ...] = (),
    where: str | None = None,
    **options: int,
) -> PreflightReport:
    preparer = Preparer(Config(captions=CaptionConfig((caption_key, *more_keys))))
    keeps = None if where is None else Filter(Where.parse(where))
    return preflight(expand_sources(train_data), TarReader(), preparer, WordTokenizer(), where=keeps, **options)


def test_it_reports_what_the_samples_look_like(shards: Shards) -> None:
    folder = shards([5, 5, 5, 5], captions=lambda i: "word " * (i + 1), image_size=40)[0].parent
    report = look(str(folder), samples=4, shards=2)
    assert report.valid == report.seen == 8
    assert [Path(shard).name for shard in report.shards] == ["shard-00000.tar", "shard-00003.tar"]
    assert report.formats == {"JPEG": 8}
    assert set(report.image_sizes) == {(40, 40)}
    assert report.caption_lengths == [3, 4, 5, 6, 18, 19, 20, 21]
    assert report.caption_percentiles() == (18, 21, 21)
    assert report.share_truncated == 0.5
    text = str(report)
    for part in (
        "8 of 8 samples valid in 2 shards",
        "jpg, json, txt",
        "JPEG 8",
        "40x40",
        "18 tokens median",
        "50% longer",
        "MiB/s read",
        "samples/s decoded",
    ):
        assert part in text


def test_with_a_filter_it_reads_on_until_enough_samples_are_kept(shards: Shards) -> None:
    folder = shards([60, 60])[0].parent
    report = look(str(folder), where="index > 40 and index != 42", samples=4)
    assert (report.valid, report.filtered) == (8, 42)
    assert report.keys[:4] == ["00000041", "00000043", "00000044", "00000045"]
    assert "--where keeps 8 of 50 samples read" in str(report)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("index < 0", "keeps none of 10 samples looked at; fields of their records: alt, index"),
        ("indx < 3", "keeps none of 10 samples looked at; no record has 'indx'; fields of their records: alt, index"),
    ],
)
def test_a_filter_that_keeps_nothing_is_refused_with_the_fields_there_are(
    shards: Shards, where: str, message: str
) -> None:
    with pytest.raises(DataConfigError, match=message):
        look(str(shards([5, 5])[0].parent), where=where)


def test_one_bad_shard_or_sample_among_good_ones_is_only_reported(shards: Shards) -> None:
    paths = shards([4, 4, 4], broken={0: "no_caption", 1: "truncated_image"})
    paths[1].write_bytes(b"this is no tar" * 100)
    report = look(str(paths[0].parent))
    assert report.valid == 6
    assert report.skipped == {"no_caption": 1, "undecodable_image": 1}
    assert list(report.failed) == [str(paths[1])]
    assert str(paths[1]) in str(report)


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_set_without_a_valid_sample_is_refused_with_the_reason(shards: Shards, breakage: str) -> None:
    folder = shards([3, 3], broken=dict.fromkeys(range(6), breakage))[0].parent
    words = {
        "truncated_image": "undecodable_image 6",
        "not_an_image": "undecodable_image 6",
        "empty_image": "empty_image 6",
        "no_image": "no sample has an image; fields seen: json, txt",
        "no_caption": "no sample has a caption under 'txt' .--caption-key.; fields seen: jpg, json",
        "empty_caption": "the captions under 'txt' are empty",
    }
    with pytest.raises(DataConfigError, match=words[breakage]):
        look(str(folder))


def test_a_caption_key_that_no_sample_has_is_named(shards: Shards) -> None:
    folder = shards([3])[0].parent
    assert look(str(folder), caption_key="json:alt").valid == 3
    with pytest.raises(DataConfigError, match="under 'json:caption'"):
        look(str(folder), caption_key="json:caption")
    with pytest.raises(DataConfigError, match=r"under 'json:caption', 'cap' \(--caption-key\)"):
        look(str(folder), caption_key="json:caption", more_keys=("cap",))


def test_shards_that_are_no_tars_or_hold_nothing_are_refused(tmp_path: Path, shards: Shards) -> None:
    (tmp_path / "bad.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataConfigError, match=r"bad\.tar cannot be read"):
        look(str(tmp_path / "bad.tar"))
    empty = shards([0])[0]
    with pytest.raises(DataConfigError, match="hold no samples"):
        look(str(empty))


def test_a_missing_bucket_object_or_key_is_told_within_seconds(s3_server: S3Server) -> None:
    began = time.monotonic()
    with pytest.raises(DataConfigError, match="no such bucket: nowhere"):
        look("s3://nowhere/{0..9}.tar")
    with pytest.raises(DataConfigError, match=r"none of 3 shards .*no such object"):
        look(s3_server.url("preflight-none/{0..9}.tar"))
    assert time.monotonic() - began < 10


def test_a_command_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(DataConfigError, match="No such file"):
        look("pipe:cat /nowhere/x.tar")


def test_shards_from_a_bucket_are_read(s3_server: S3Server, shards: Shards) -> None:
    for number, path in enumerate(shards([3, 3])):
        s3_server.upload(path, f"preflight/{number}.tar")
    assert look(s3_server.url("preflight/{0..1}.tar")).valid == 6


def test_it_logs_nothing_itself_and_leaves_no_stream_open(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        look(str(shards([40])[0].parent), samples=2)
    assert not caplog.records
