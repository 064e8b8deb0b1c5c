from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from data.captions import CaptionConfig
from data.catalog import open_catalog
from data.config import LoaderConfig
from data.errors import DataConfigError, StorageError
from data.loader import build_train_loader
from data.rows import CsvConfig
from data.samples import RawSample
from data.table import TableReader, table_shards
from data.urls import expand_sources
from tests.data.pictures import encode, jpeg, picture

TRICKY = ["plain", 'with "quotes"', "two\nlines", "tab\there, comma", "ümläut ☃", "", "  ", "last"]


def write_list(folder: Path, captions: list[str], separator: str = "\t", name: str = "pairs.csv") -> Path:
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for i, caption in enumerate(captions):
        path = folder / "images" / f"{i}.jpg"
        path.write_bytes(jpeg(20, 30, i))
        rows.append([str(i), str(path), caption])
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([["id", "filepath", "title"], *rows])
    return folder / name


def read_all(path: Path, config: CsvConfig, rows_per_shard: int) -> list[RawSample]:
    sources, counts = table_shards(expand_sources(str(path)), config, rows_per_shard)
    shards = [shard for source in sources for shard in source.urls]
    read = [list(TableReader(config).read(shard)) for shard in shards]
    assert tuple(map(len, read)) == counts
    return [raw for samples in read for raw in samples]


@pytest.mark.parametrize("rows_per_shard", [1, 3, 100])
@pytest.mark.parametrize("separator", ["\t", ","])
def test_every_row_comes_once_in_order_however_it_is_cut(tmp_path: Path, rows_per_shard: int, separator: str) -> None:
    path = write_list(tmp_path, TRICKY, separator)
    samples = read_all(path, CsvConfig(csv_separator=separator), rows_per_shard)
    assert [raw.fields["txt"].decode() for raw in samples] == TRICKY
    assert [raw.fields["jpg"] for raw in samples] == [jpeg(20, 30, i) for i in range(len(TRICKY))]
    assert len({raw.key for raw in samples}) == len(TRICKY)
    assert [raw.index for raw in samples] == [i % rows_per_shard for i in range(len(TRICKY))]


def test_a_shard_can_be_entered_anywhere(tmp_path: Path) -> None:
    path = write_list(tmp_path, TRICKY)
    (source,), _ = table_shards(expand_sources(str(path)), CsvConfig(), 5)
    reader = TableReader(CsvConfig())
    whole = list(reader.read(source.urls[0]))
    assert list(reader.read(source.urls[0], start=2)) == whole[2:]
    assert list(reader.read(source.urls[0], start=1, stop=3)) == whole[1:3]
    assert list(reader.read(source.urls[0], start=5)) == []


def test_byte_order_mark_windows_lines_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(picture(8, 8), "PNG"))
    text = "\ufefffilepath\ttitle\r\na.png\tone\r\n\r\na.png\ttwo\r\n"
    (tmp_path / "l.tsv").write_bytes(text.encode())
    samples = read_all(tmp_path / "l.tsv", CsvConfig(), 1)
    assert [(raw.fields["txt"], sorted(raw.fields)) for raw in samples] == [
        (b"one", ["png", "txt"]),
        (b"two", ["png", "txt"]),
    ]


def test_relative_paths_count_from_the_list_when_the_working_directory_lacks_them(tmp_path: Path) -> None:
    write_list(tmp_path, ["a"])
    (tmp_path / "l.csv").write_text("title\tfilepath\nhere\timages/0.jpg\n")
    (raw,) = read_all(tmp_path / "l.csv", CsvConfig(), 10)
    assert raw.fields["jpg"] == jpeg(20, 30, 0)


def test_a_missing_picture_or_a_short_row_is_a_sample_without_image(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("filepath\ttitle\nnothere.jpg\ta\nshort\n")
    samples = read_all(tmp_path / "l.csv", CsvConfig(), 10)
    assert [raw.fields for raw in samples] == [{"txt": b"a"}, {"txt": b""}]


def test_pictures_and_lists_may_lie_behind_urls(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/csv-test/a.jpg", jpeg(20, 30))
    memory.pipe_file(
        "/csv-test/l.csv", b"filepath\ttitle\nmemory://csv-test/a.jpg\tone\nmemory://csv-test/none.jpg\ttwo\n"
    )
    (source,), counts = table_shards(expand_sources("memory://csv-test/l.csv"), CsvConfig(), 1)
    assert counts == (1, 1)
    samples = [raw for shard in source.urls for raw in TableReader(CsvConfig()).read(shard)]
    assert [sorted(raw.fields) for raw in samples] == [["jpg", "txt"], ["txt"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\ttitle\na\tb\n", r"no column 'filepath' \(--csv-img-key\); columns: path, title"),
        ("filepath,title\na,b\n", "is --csv-separator right"),
        ("filepath\ttitle\n", "has no rows"),
        ("", "no column 'filepath'"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(DataConfigError, match=message):
        table_shards(expand_sources(str(tmp_path / "l.csv")), CsvConfig())


def test_a_list_that_goes_away_while_training_is_a_data_error(tmp_path: Path) -> None:
    path = write_list(tmp_path, ["a"])
    (source,), _ = table_shards(expand_sources(str(path)), CsvConfig())
    path.unlink()
    with pytest.raises(StorageError, match=r"pairs\.csv"):
        list(TableReader(CsvConfig()).read(source.urls[0]))


def test_other_columns_are_the_record_where_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(
        "filepath,title,similarity,NSFW,code,width,a.b\n"
        "a.jpg,one,0.31,UNLIKELY,007,800,x\nb.jpg,two,,UNSURE,-1e3,9,\nc.jpg,three\n"
    )
    (source,), _ = table_shards(expand_sources(str(tmp_path / "l.csv")), CsvConfig(csv_separator=","))
    fields = ("similarity", "NSFW", "code", "width", "a.b", "missing")
    samples = list(TableReader(CsvConfig(csv_separator=","), fields).read(source.urls[0]))
    assert [raw.record for raw in samples] == [
        {"similarity": 0.31, "NSFW": "UNLIKELY", "code": "007", "width": 800, "a.b": "x"},
        {"similarity": None, "NSFW": "UNSURE", "code": -1000.0, "width": 9, "a.b": None},
        dict.fromkeys(("similarity", "NSFW", "code", "width", "a.b")),
    ]
    assert all(raw.record is None for raw in TableReader(CsvConfig(csv_separator=",")).read(source.urls[0]))


def test_a_filter_and_captions_of_other_columns_go_through_the_loader(tmp_path: Path) -> None:
    write_list(tmp_path, ["unused"] * 40)
    rows = [f"images/{n}.jpg\tunused\talt {n}\t{n % 2 / 10}" for n in range(40)]
    (tmp_path / "l.tsv").write_text("\n".join(["filepath\ttitle\talt\tsimilarity", *rows]) + "\n")
    catalog = open_catalog(str(tmp_path / "l.tsv"))
    config = LoaderConfig(
        sources=catalog.sources, sizes=catalog.sizes, dataset_type="csv", batch_size=4, image_size=(8, 8),
        where="similarity < 0.05", captions=CaptionConfig(("json:alt",)),
    )  # fmt: skip
    with build_train_loader(config, lambda texts: torch.tensor([[int(t.split()[1])] for t in texts]), 0, 1) as loader:
        assert {int(n) % 2 for _ in range(4) for n in next(loader).tokens[:, 0]} == {0}


def test_a_long_row_of_digits_is_a_code_and_no_number(tmp_path: Path) -> None:
    (tmp_path / "l.tsv").write_text(f"filepath\ttitle\tcode\na.jpg\tone\t{'9' * 5000}\n")
    (source,), _ = table_shards(expand_sources(str(tmp_path / "l.tsv")), CsvConfig())
    (raw,) = TableReader(CsvConfig(), ("code",)).read(source.urls[0])
    assert raw.record == {"code": "9" * 5000}
