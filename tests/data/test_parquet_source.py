from __future__ import annotations

import builtins
import dataclasses
import datetime
import decimal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.captions import CaptionConfig
from data.catalog import open_catalog
from data.config import LoaderConfig
from data.errors import DataConfigError, DataError, ShardError
from data.eval_reader import read_pairs
from data.files import open_seekable
from data.loader import build_train_loader
from data.readers import build_reader
from data.rows import CsvConfig
from data.samples import RawSample, record_of
from data.table import TableReader, table_shards
from data.urls import expand_sources
from data.where import Filter, Where
from tests.data.pictures import encode, jpeg, picture
from tests.helpers.s3 import S3Server

COUNT = 23


def parquet() -> tuple[Any, Any]:
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write(
    path: Path, columns: dict[str, list[Any]], rows_per_group: int = 10, types: dict[str, Any] | None = None
) -> Path:
    pyarrow, files = parquet()
    arrays = {name: pyarrow.array(values, (types or {}).get(name)) for name, values in columns.items()}
    files.write_table(pyarrow.table(arrays), path, row_group_size=rows_per_group)
    return path


def pairs(folder: Path, count: int = COUNT) -> dict[str, list[Any]]:
    """Paths beside the list, captions, and what LAION's tables hold besides."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"images/{number}.jpg").write_bytes(jpeg(12, 16, number))
    return {
        "filepath": [f"images/{number}.jpg" for number in range(count)],
        "title": [f"title {number}" for number in range(count)],
        "similarity": [None if number == 1 else number / count for number in range(count)],
        "NSFW": ["UNLIKELY" if number % 2 else "NSFW" for number in range(count)],
        "meta": [{"alts": [f"alt {1000 + number}"], "n": number} for number in range(count)],
    }


def read_all(path: Path | str, per_shard: int | None = None, fields: tuple[str, ...] = ()) -> list[RawSample]:
    (source,), counts = table_shards(expand_sources(str(path)), CsvConfig(), per_shard)
    found = [list(TableReader(CsvConfig(), fields).read(shard)) for shard in source.urls]
    assert tuple(map(len, found)) == counts
    return [raw for samples in found for raw in samples]


def loader_config(path: Path, **changes: object) -> LoaderConfig:
    catalog = open_catalog(str(path))
    assert catalog.dataset_type == "csv"
    config = LoaderConfig(
        sources=catalog.sources, sizes=catalog.sizes, dataset_type="csv", batch_size=5, image_size=(8, 8)
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


class Numbers:
    def __call__(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([[int(caption.split()[-1])] for caption in captions])


@pytest.mark.parametrize("per_shard", [1, 4, 10, None])
@pytest.mark.parametrize("rows_per_group", [1, 7, 100])
def test_every_row_comes_once_in_order_however_it_is_cut(
    tmp_path: Path, per_shard: int | None, rows_per_group: int
) -> None:
    path = write(tmp_path / "l.parquet", pairs(tmp_path), rows_per_group)
    samples = read_all(path, per_shard)
    assert [raw.fields["txt"].decode() for raw in samples] == [f"title {n}" for n in range(COUNT)]
    assert [raw.fields["jpg"] for raw in samples] == [jpeg(12, 16, n) for n in range(COUNT)]
    assert [raw.key for raw in samples] == [f"{n}:images/{n}.jpg" for n in range(COUNT)]
    assert {raw.shard for raw in samples} == {str(path)}


def test_a_shard_lies_in_one_row_group_and_can_be_entered_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "l.parquet", pairs(tmp_path))
    (source,), counts = table_shards(expand_sources(str(path)), CsvConfig(), 7)
    assert counts == (7, 3, 7, 3, 3)
    reader = TableReader(CsvConfig())
    whole = list(reader.read(source.urls[2]))
    assert list(reader.read(source.urls[2], 2)) == whole[2:]
    assert list(reader.read(source.urls[2], 1, 3)) == whole[1:3]
    assert list(reader.read(source.urls[2], 7)) == []
    assert [raw.index for raw in whole] == list(range(7))


def test_one_row_group_is_read_and_of_it_the_columns_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, files = parquet()
    path = write(tmp_path / "l.parquet", pairs(tmp_path))
    (source,), _ = table_shards(expand_sources(str(path)), CsvConfig())
    asked = []
    iterate = files.ParquetFile.iter_batches
    monkeypatch.setattr(
        files.ParquetFile, "iter_batches", lambda *args, **how: asked.append(how) or iterate(*args, **how)
    )
    list(TableReader(CsvConfig(), {"NSFW", "meta.n", "nothing"}).read(source.urls[1]))
    assert [(how["row_groups"], how["columns"]) for how in asked] == [([1], ["filepath", "title", "NSFW", "meta"])]


def test_pictures_may_be_in_the_list_as_bytes_or_as_hugging_face_has_them(tmp_path: Path) -> None:
    pyarrow, _ = parquet()
    png, jpg = encode(picture(8, 8), "PNG"), jpeg(12, 16)
    (tmp_path / "beside.png").write_bytes(png)
    titles = ["a", "b", "c", "d"]
    binary = write(tmp_path / "b.parquet", {"filepath": [png, jpg, None, b""], "title": titles})
    assert [raw.fields.get("jpg") for raw in read_all(binary)] == [png, jpg, None, None]
    assert [raw.key for raw in read_all(binary)] == ["0", "1", "2", "3"]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    structs = [
        {"bytes": png, "path": "x.png"}, {"bytes": jpg, "path": None}, {"bytes": None, "path": "beside.png"}, None,
    ]  # fmt: skip
    path = write(tmp_path / "s.parquet", {"filepath": structs, "title": titles}, types={"filepath": kind})
    samples = read_all(path)
    assert [sorted(raw.fields) for raw in samples] == [["png", "txt"], ["jpg", "txt"], ["png", "txt"], ["txt"]]
    assert samples[0].fields["png"] == samples[2].fields["png"] == png and samples[0].key == "0:x.png"


def test_null_captions_are_empty(tmp_path: Path) -> None:
    columns = pairs(tmp_path, 2) | {"title": [None, "b"]}
    assert [raw.fields["txt"] for raw in read_all(write(tmp_path / "l.parquet", columns))] == [b"", b"b"]


def test_other_columns_are_the_record_only_where_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "l.parquet", pairs(tmp_path))
    assert all(raw.record is None for raw in read_all(path))
    samples = read_all(path, fields=("similarity", "NSFW", "meta.n"))
    assert record_of(samples[2]) == {"similarity": 2 / COUNT, "NSFW": "NSFW", "meta": {"alts": ["alt 1002"], "n": 2}}
    kept = [
        n for n, raw in enumerate(samples) if Filter(Where.parse("NSFW == 'UNLIKELY' and similarity < 0.3")).keeps(raw)
    ]
    assert kept == [3, 5]


def test_records_hold_what_json_could(tmp_path: Path) -> None:
    columns = pairs(tmp_path, 1) | {
        "when": [datetime.datetime(2020, 1, 2)],
        "price": [decimal.Decimal("1.5")],
        "raw": [b"x"],
        "flag": [True],
        "list": [[datetime.date(2020, 1, 2)]],
    }
    (raw,) = read_all(write(tmp_path / "l.parquet", columns), fields=("when", "price", "raw", "flag", "list"))
    assert raw.record == {
        "when": "2020-01-02T00:00:00", "price": 1.5, "raw": None, "flag": True, "list": ["2020-01-02"],
    }  # fmt: skip


def test_every_row_comes_once_an_epoch_through_the_loader(tmp_path: Path) -> None:
    config = loader_config(write(tmp_path / "l.parquet", pairs(tmp_path, 20), 6))
    for captions, first in ((CaptionConfig(), 0), (CaptionConfig(("json:meta.alts",)), 1000)):
        with build_train_loader(dataclasses.replace(config, captions=captions), Numbers(), 0, 1) as loader:
            numbers = [int(n) for _ in range(4) for n in next(loader).tokens[:, 0]]
        assert sorted(numbers) == list(range(first, first + 20))
    with build_train_loader(dataclasses.replace(config, where="NSFW == 'UNLIKELY'"), Numbers(), 0, 1) as loader:
        assert {int(n) % 2 for _ in range(4) for n in next(loader).tokens[:, 0]} == {1}


def test_the_reader_takes_from_a_row_what_captions_and_filter_need(tmp_path: Path) -> None:
    config = loader_config(
        write(tmp_path / "l.parquet", pairs(tmp_path)),
        where="similarity > 0.5",
        captions=CaptionConfig(("txt", "json:meta.alts")),
    )
    raw = next(iter(build_reader(config).read(config.urls[0])))
    assert set(raw.record) == {"similarity", "meta"}


def test_lists_of_both_formats_go_together(tmp_path: Path) -> None:
    write(tmp_path / "l.parquet", pairs(tmp_path, 3))
    (tmp_path / "l.tsv").write_text("filepath\ttitle\nimages/0.jpg\ttitle 9\n")
    catalog = open_catalog(f"{tmp_path}/l.parquet::{tmp_path}/l.tsv")
    assert (catalog.dataset_type, catalog.sizes, catalog.num_samples) == ("csv", (3, 1), 4)


def test_lists_may_lie_in_a_bucket(tmp_path: Path, s3_server: S3Server) -> None:
    path = write(tmp_path / "l.parquet", pairs(tmp_path))
    captions = [raw.fields["txt"] for raw in read_all(path)]
    assert [raw.fields["txt"] for raw in read_all(s3_server.upload(path, "lists/l.parquet"), 4)] == captions


def test_evaluation_reads_pairs_from_lists(tmp_path: Path) -> None:
    def to_tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((4, 4))))

    path = str(write(tmp_path / "l.parquet", pairs(tmp_path, 5)))
    for key, captions in (
        ("txt", [f"title {n}" for n in range(5)]),
        ("json:meta.alts", [f"alt {1000 + n}" for n in range(5)]),
    ):
        (batch,) = read_pairs(path, 0, 1, to_tensor, caption_key=key)
        assert batch.captions == captions
    (batch,) = read_pairs(path, 0, 1, to_tensor, caption_key="json:of_the_training_set")
    assert batch.captions == [f"title {n}" for n in range(5)]


def test_a_list_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    columns = pairs(tmp_path, 2)
    cases = {
        "no column 'filepath' \\(--csv-img-key\\); columns: URL, title": {"URL": ["a"], "title": ["b"]},
        "no column 'title' \\(--csv-caption-key\\)": {"filepath": ["a"], "alt": ["b"]},
        "holds int64; known are text": {"filepath": [1], "title": ["b"]},
        "has no rows": {name: [] for name in ("filepath", "title")},
    }
    for message, bad in cases.items():
        pyarrow, _ = parquet()
        types = {"filepath": pyarrow.string(), "title": pyarrow.string()} if not next(iter(bad.values())) else None
        with pytest.raises(DataConfigError, match=message):
            read_all(write(tmp_path / "bad.parquet", bad, types=types))
    write(tmp_path / "good.parquet", columns)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-20])
    with pytest.raises(DataConfigError, match=r"cut\.parquet: cannot be read as a Parquet list \(broken Parquet"):
        read_all(tmp_path / "cut.parquet")
    with pytest.raises(DataConfigError, match="cannot come from a pipe"):
        open_catalog(f"pipe:cat {tmp_path}/good.parquet", dataset_type="csv")


def test_a_list_that_breaks_while_training_costs_the_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "l.parquet", pairs(tmp_path))
    (source,), _ = table_shards(expand_sources(str(path)), CsvConfig())
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(ShardError) as caught:
        list(TableReader(CsvConfig()).read(source.urls[0]))
    assert caught.value.kind == "corrupt" and "l.parquet: broken Parquet" in str(caught.value)
    path.unlink()
    with pytest.raises(ShardError) as caught:
        list(TableReader(CsvConfig()).read(source.urls[0]))
    assert caught.value.kind == "missing"
    with pytest.raises(DataError):
        next(read_pairs(source, 0, 1, lambda image: torch.zeros(1)))


def test_without_pyarrow_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return import_module(name, *args)

    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    (tmp_path / "l.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataConfigError, match=r"need pyarrow .*pip install clipyard\[parquet\]") as caught:
        open_catalog(str(tmp_path / "l.parquet"))
    assert "\n" not in str(caught.value)


def test_a_seekable_file_reads_anywhere(tmp_path: Path, s3_server: S3Server) -> None:
    content = bytes(range(256)) * 20_000
    (tmp_path / "f").write_bytes(content)
    for url in (str(tmp_path / "f"), s3_server.upload(content, "seekable")):
        with open_seekable(url) as file:
            assert file.seek(-8, 2) == len(content) - 8 and file.read() == content[-8:]
            assert file.seek(1000) == 1000 and file.read(3_000_000) == content[1000:3_001_000]
            assert file.read(10) == content[3_001_000:3_001_010] and file.tell() == 3_001_010
            file.seek(len(content) + 5)
            assert file.read(1) == b""
