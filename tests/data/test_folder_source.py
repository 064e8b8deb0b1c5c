from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from data import folder_source
from data.batch import Batch, fingerprint_of
from data.captions import CaptionConfig
from data.catalog import open_catalog
from data.config import LoaderConfig
from data.errors import DataConfigError, StorageError
from data.eval_reader import read_pairs
from data.folder_source import FolderReader, folder_shards
from data.loader import build_train_loader, run_preflight
from data.samples import RawSample
from data.urls import Source, dataset_type_of, expand_sources, mask_url
from tests.data.pictures import encode, jpeg, picture


class Numbers:
    """The number at a caption's end."""

    def __call__(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([[int(caption.split()[-1]), 0] for caption in captions])


def put(folder: Path, name: str, content: bytes = b"") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content or jpeg(12, 16))


def numbered(folder: Path, count: int) -> Path:
    for number in range(count):
        put(folder, f"part{number % 3}/{number:03d}.jpg", jpeg(12, 16, number))
        put(folder, f"part{number % 3}/{number:03d}.txt", f"number {number}".encode())
        put(folder, f"part{number % 3}/{number:03d}.json", b'{"n": %d, "alt": "alt %d"}' % (number, 1000 + number))
    return folder


def read_all(folder: Path, per_shard: int = 1000, extensions: tuple[str, ...] = ("txt",)) -> list[RawSample]:
    (source,), counts = folder_shards(expand_sources(str(folder)), per_shard)
    found = [list(FolderReader(extensions).read(shard)) for shard in source.urls]
    assert tuple(map(len, found)) == counts
    return [raw for samples in found for raw in samples]


def loader_config(folder: Path, **changes: object) -> LoaderConfig:
    catalog = open_catalog(str(folder))
    assert catalog.dataset_type == "folder"
    config = LoaderConfig(
        sources=catalog.sources, sizes=catalog.sizes, dataset_type="folder", batch_size=6, image_size=(8, 8)
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def take_epoch(config: LoaderConfig, count: int) -> list[Batch]:
    with build_train_loader(config, Numbers(), 0, 1) as loader:
        return [next(loader) for _ in range(count // config.batch_size)]


@pytest.mark.parametrize("per_shard", [1, 2, 3, 100])
def test_pictures_come_in_order_with_the_files_beside_them(tmp_path: Path, per_shard: int) -> None:
    for name in ("b.jpg", "a.JPG", "sub/c.png", "sub/deep/d.webp", "z.jpeg"):
        put(tmp_path, name)
        put(tmp_path, name.rpartition(".")[0] + ".txt", name.encode())
    samples = read_all(tmp_path, per_shard)
    assert [raw.key for raw in samples] == ["a", "b", "z", "sub/c", "sub/deep/d"]
    assert [sorted(raw.fields) for raw in samples] == [[e, "txt"] for e in ("jpg", "jpg", "jpeg", "png")] + [
        ["txt", "webp"]
    ]
    assert all(raw.fields["txt"].decode().startswith(raw.key) and raw.shard == str(tmp_path) for raw in samples)


def test_keys_end_at_the_last_dot_as_in_tars(tmp_path: Path) -> None:
    for name in (
        "photo.v2.jpg",
        "photo.v2.txt",
        "photo.jpg",
        "photo.txt",
        "photo.seg.png",
        "v1.0/cat.jpg",
        "v1.0/cat.txt",
    ):
        put(tmp_path, name, name.encode())
    samples = read_all(tmp_path)
    assert [(raw.key, raw.fields["txt"].decode()) for raw in samples] == [
        ("photo", "photo.txt"), ("photo.v2", "photo.v2.txt"), ("v1.0/cat", "v1.0/cat.txt"),
    ]  # fmt: skip


def test_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    for name in (
        "cat.png",
        "cat.jpg",
        ".hidden.jpg",
        ".cache/x.jpg",
        "__MACOSX/cat.jpg",
        "notes.txt",
        "README",
        "x.mp4",
    ):
        put(tmp_path, name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.jpg.link").symlink_to(tmp_path / "nothing")
    samples = read_all(tmp_path)
    assert [(raw.key, sorted(raw.fields)) for raw in samples] == [("cat", ["jpg"])]


def test_linked_folders_are_read(tmp_path: Path) -> None:
    numbered(tmp_path / "elsewhere", 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(read_all(tmp_path / "set")) == 3


def test_only_files_that_are_wanted_are_opened(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    put(tmp_path, "a.TXT", b"upper")
    put(tmp_path, "a.json", b"{}")
    assert sorted(read_all(tmp_path, extensions=("txt", "cap"))[0].fields) == ["jpg", "txt"]
    assert sorted(read_all(tmp_path, extensions=("json",))[0].fields) == ["jpg", "json"]


def test_odd_names_survive(tmp_path: Path) -> None:
    names = ["with space.jpg", "ümläut.jpg", "a#pictures=0-3&names=x.jpg", "new\nline.jpg", "ça va?.jpg"]
    for name in names:
        put(tmp_path, name)
    (tmp_path / os.fsdecode(b"latin\xe9.jpg")).write_bytes(jpeg(12, 16))
    samples = read_all(tmp_path / ".", 2)
    assert len(samples) == 6 and all("jpg" in raw.fields for raw in samples)
    assert {raw.key.encode() for raw in samples} >= {name.removesuffix(".jpg").encode() for name in names}


def test_a_shard_can_be_entered_anywhere_and_is_short_in_a_log(tmp_path: Path) -> None:
    (source,), _ = folder_shards(expand_sources(str(numbered(tmp_path, 9))), 5)
    whole = list(FolderReader().read(source.urls[0]))
    assert list(FolderReader().read(source.urls[0], 2)) == whole[2:]
    assert list(FolderReader().read(source.urls[0], 1, 3)) == whole[1:3]
    assert [raw.index for raw in whole] == list(range(5))
    assert mask_url(source.urls[0]) == f"{tmp_path}#pictures=0-5&names=***"


def test_many_names_take_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        folder_source, "_pictures", lambda root: (f"{n // 1000:04d}/{n:09d}.jpg" for n in range(50_000))
    )
    (source,), counts = folder_shards((Source("s", (str(tmp_path),)),))
    assert sum(counts) == 50_000
    assert sum(map(len, source.urls)) < 50_000 * 8


def test_every_picture_comes_once_an_epoch_through_the_loader(tmp_path: Path) -> None:
    config = loader_config(numbered(tmp_path, 30))
    batches = take_epoch(config, 30)
    assert sorted(int(n) for batch in batches for n in batch.tokens[:, 0]) == list(range(30))
    assert {batch.shards[0] for batch in batches} == {str(tmp_path)}
    alt = take_epoch(dataclasses.replace(config, captions=CaptionConfig(("json:alt",))), 30)
    assert sorted(int(n) for batch in alt for n in batch.tokens[:, 0]) == list(range(1000, 1030))


def test_folders_without_a_catalog_are_cut_by_the_loader(tmp_path: Path) -> None:
    config = loader_config(numbered(tmp_path, 12), sources=(Source("s", (str(tmp_path),)),), sizes=None)
    assert len(take_epoch(config, 12)) == 2


def test_a_picture_that_goes_is_a_sample_without_image_and_a_folder_that_goes_is_missing(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "set", 3)
    (source,), _ = folder_shards(expand_sources(str(folder)))
    (folder / "part1/001.jpg").unlink()
    assert [sorted(raw.fields) for raw in FolderReader().read(source.urls[0])] == [
        ["jpg", "txt"],
        ["txt"],
        ["jpg", "txt"],
    ]
    folder.rename(tmp_path / "other")
    with pytest.raises(StorageError, match="no such directory") as caught:
        list(FolderReader().read(source.urls[0]))
    assert caught.value.kind == "missing" and "names" not in str(caught.value)


def test_a_resume_sees_that_the_folder_changed(tmp_path: Path) -> None:
    config = loader_config(numbered(tmp_path, 3))
    assert fingerprint_of(loader_config(tmp_path)) == fingerprint_of(config)
    (tmp_path / "part0/000.jpg").rename(tmp_path / "part0/00x.jpg")
    assert fingerprint_of(loader_config(tmp_path)) != fingerprint_of(config)


def test_class_folders_without_captions_are_told_so_before_anything(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"):
        put(tmp_path, name)
    with pytest.raises(DataConfigError, match=r"no_caption 3\): no sample has a caption under 'txt' \(--caption-key\)"):
        run_preflight(loader_config(tmp_path), Numbers())


def test_a_directory_is_what_it_holds(tmp_path: Path) -> None:
    put(tmp_path, "pictures/sub/a.jpg")
    put(tmp_path, "both/a.jpg")
    put(tmp_path, "both/a.tar")
    (tmp_path / "empty").mkdir()
    assert dataset_type_of(str(tmp_path / "pictures")) == "folder"
    assert expand_sources(str(tmp_path / "pictures"))[0].urls == (str(tmp_path / "pictures"),)
    assert dataset_type_of(str(tmp_path / "both")) == "webdataset"
    assert expand_sources(str(tmp_path / "both"))[0].urls == (str(tmp_path / "both/a.tar"),)
    assert open_catalog(str(tmp_path / "both"), dataset_type="folder").num_samples == 1
    with pytest.raises(DataConfigError, match=r"holds no \*.tar and no picture"):
        open_catalog(str(tmp_path / "empty"))
    with pytest.raises(DataConfigError, match="holds no picture"):
        open_catalog(str(tmp_path / "empty"), dataset_type="folder")


@pytest.mark.parametrize("url", ["s3://bucket/pictures", "pipe:cat x"])
def test_folders_are_local(url: str) -> None:
    with pytest.raises(DataConfigError, match="reads local directories"):
        open_catalog(url, dataset_type="folder")


def test_evaluation_reads_pairs_from_folders(tmp_path: Path) -> None:
    def to_tensor(image: object) -> torch.Tensor:
        return torch.zeros(1)

    numbered(tmp_path, 5)
    (batch,) = read_pairs(str(tmp_path), 0, 1, to_tensor)
    assert sorted(batch.captions or []) == [f"number {n}" for n in range(5)]
    (batch,) = read_pairs(str(tmp_path), 0, 1, to_tensor, caption_key="json:alt")
    assert sorted(batch.captions or []) == [f"alt {1000 + n}" for n in range(5)]


def test_a_picture_is_known_by_any_of_its_extensions(tmp_path: Path) -> None:
    put(tmp_path, "a.bmp", encode(picture(8, 8), "BMP"))
    assert sorted(read_all(tmp_path)[0].fields) == ["bmp"]
