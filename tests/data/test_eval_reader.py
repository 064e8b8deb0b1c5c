from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data.errors import DataError
from data.eval_reader import EvalBatch, class_names_of, read_labelled, read_pairs, templates_of
from tests.data.pictures import encode, picture
from tests.helpers.s3 import S3Server
from tests.helpers.shards import caption_of, draw_image, encode_image

COUNTS = [5, 1, 11]
TOTAL = sum(COUNTS)


def to_tensor(image: Image.Image) -> torch.Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float()


def write_benchmark(root: Path, extension: str = "webp", nested: bool = True, broken: int | None = None) -> Path:
    """CLIP_benchmark's layout: sample i has label i % 3."""
    folder = root / "test" if nested else root
    folder.mkdir(parents=True)
    index = 0
    for number, count in enumerate(COUNTS):
        with webdataset.TarWriter(str(folder / f"{number}.tar"), encoder=False) as writer:
            for _ in range(count):
                image = encode_image(draw_image(index), extension)
                content = image[: len(image) // 2] if index == broken else image
                writer.write({"__key__": f"s{index:07d}", extension: content, "cls": str(index % 3).encode()})
                index += 1
    if nested:
        (folder / "nshards.txt").write_text(f"{len(COUNTS)}\n")
    (root / "classnames.txt").write_text("red fox\nowl\nzebra\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n\nart of a {c}.\n")
    return root


def labelled(url: str, rank: int = 0, world_size: int = 1, **options: int) -> list[EvalBatch]:
    return list(read_labelled(url, rank, world_size, to_tensor, **{"batch_size": 4, "workers": 2} | options))


def indices_of(batches: list[EvalBatch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.indices]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 3])
def test_every_sample_comes_exactly_once_over_all_ranks(tmp_path: Path, world_size: int, workers: int) -> None:
    url = str(write_benchmark(tmp_path / "set"))
    seen: dict[int, tuple[int, torch.Tensor]] = {}
    for rank in range(world_size):
        batches = labelled(url, rank, world_size, workers=workers)
        assert indices_of(batches) == list(range(rank, TOTAL, world_size))
        for batch in batches:
            assert batch.labels is not None
            assert batch.images.shape[0] == len(batch.labels) == len(batch.indices)
            for index, label, image in zip(batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True):
                assert index not in seen
                seen[index] = (label, image)
    assert sorted(seen) == list(range(TOTAL))
    for index, (label, image) in seen.items():
        assert label == index % 3
        stored = Image.open(__import__("io").BytesIO(encode_image(draw_image(index), "webp"))).convert("RGB")
        torch.testing.assert_close(image, to_tensor(stored), rtol=0, atol=0)


def test_more_ranks_than_samples_leave_some_with_nothing(tmp_path: Path) -> None:
    url = str(write_benchmark(tmp_path / "set"))
    assert labelled(url, TOTAL, TOTAL + 2) == []
    assert indices_of(labelled(url, TOTAL - 1, TOTAL + 2)) == [TOTAL - 1]


@pytest.mark.parametrize("extension", ["webp", "jpg", "png"])
def test_the_layout_of_clip_benchmark_is_read_with_names_and_templates(tmp_path: Path, extension: str) -> None:
    url = str(write_benchmark(tmp_path / "set", extension))
    assert indices_of(labelled(url)) == list(range(TOTAL))
    assert class_names_of(url) == ["red fox", "owl", "zebra"]
    assert templates_of(url) == ["a photo of a {c}.", "art of a {c}."]


def test_a_flat_folder_or_a_list_of_tars_will_do(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "set", nested=False)
    assert indices_of(labelled(str(root))) == list(range(TOTAL))
    assert indices_of(labelled(f"{root}/{{0..1}}.tar")) == list(range(6))


def test_a_set_in_a_bucket_is_read(tmp_path: Path, s3_server: S3Server) -> None:
    root = write_benchmark(tmp_path / "set")
    for path in root.rglob("*.*"):
        s3_server.upload(path, f"eval/{path.relative_to(root)}")
    url = s3_server.url("eval")
    assert indices_of(labelled(url, 1, 2)) == list(range(1, TOTAL, 2))
    assert class_names_of(url) == ["red fox", "owl", "zebra"]
    assert templates_of(s3_server.url("eval/test")) is None


def test_an_image_folders_labels_are_its_sorted_folders(tmp_path: Path) -> None:
    for number, name in enumerate(["n02", "n01", "n10"]):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(2):
            (tmp_path / name / f"{i}.JPEG").write_bytes(encode(picture(10, 12, number)))
        (tmp_path / name / "deeper" / "x.png").write_bytes(encode(picture(9, 9), "PNG"))
        (tmp_path / name / "notes.txt").write_text("not a picture")
    batches = labelled(str(tmp_path), batch_size=100)
    assert batches[0].labels is not None
    assert batches[0].labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert class_names_of(str(tmp_path)) == ["n01", "n02", "n10"]
    both = sorted(indices_of(labelled(str(tmp_path), 0, 2)) + indices_of(labelled(str(tmp_path), 1, 2)))
    assert both == list(range(9))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_pairs_in_shards_are_split_exactly_with_their_captions(
    shards: Callable[..., list[Path]], world_size: int
) -> None:
    folder = shards(COUNTS)[0].parent
    captions: dict[int, str] = {}
    for rank in range(world_size):
        for batch in read_pairs(str(folder), rank, world_size, to_tensor, batch_size=4, workers=2):
            assert batch.captions is not None
            assert batch.tokens is None
            captions |= dict(zip(batch.indices.tolist(), batch.captions, strict=True))
    assert captions == {i: caption_of(i) for i in range(TOTAL)}


def test_pairs_are_tokenised_when_a_tokenizer_is_given(shards: Callable[..., list[Path]]) -> None:
    url = str(shards([5])[0])
    (batch,) = read_pairs(
        url, 0, 1, to_tensor, lambda texts: torch.tensor([[len(text)] for text in texts]), batch_size=8
    )
    assert batch.tokens is not None
    assert batch.tokens[:, 0].tolist() == [len(caption_of(i)) for i in range(5)]
    (other,) = read_pairs(url, 0, 1, to_tensor, caption_key="json:alt")
    assert other.captions == batch.captions


def test_pairs_may_come_from_a_csv_list(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(encode_image(draw_image(i)))
    with open(tmp_path / "pairs.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [["filepath", "title"]] + [[f"{i}.jpg", caption_of(i)] for i in range(5)]
        )
    batches = list(read_pairs(str(tmp_path / "pairs.tsv"), 1, 2, to_tensor))
    assert [(batch.indices.tolist(), batch.captions) for batch in batches] == [([1, 3], [caption_of(1), caption_of(3)])]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_an_error_that_names_it(tmp_path: Path, workers: int) -> None:
    url = str(write_benchmark(tmp_path / "set", broken=7))
    with pytest.raises(DataError, match=r"'s0000007' of .*2\.tar.*undecodable_image"):
        labelled(url, workers=workers)
    assert indices_of(labelled(url, 0, 2)) == list(range(0, TOTAL, 2)), "the other rank does not decode it"


def test_a_sample_without_label_or_caption_is_an_error_that_names_it(shards: Callable[..., list[Path]]) -> None:
    path = str(shards([3], broken={1: "no_caption"})[0])
    with pytest.raises(DataError, match=r"no_label.*members: jpg, json"):
        labelled(path)
    with pytest.raises(DataError, match=r"'00000001'.*no_caption"):
        list(read_pairs(path, 0, 1, to_tensor))


def test_a_missing_shard_or_set_is_an_error_that_names_it(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "set")
    (root / "test" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar"):
        labelled(str(root))
    with pytest.raises(DataError, match=r"found neither test/nshards\.txt"):
        labelled(str(tmp_path / "nowhere"))


def test_leaving_early_leaves_nothing_running(tmp_path: Path) -> None:
    url = str(write_benchmark(tmp_path / "set"))
    batches = read_labelled(url, 0, 1, to_tensor, batch_size=2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
