"""Evaluation sets as other machines and tools leave them: what is read, and what is refused rather than guessed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data.errors import DataConfigError, DataError
from data.eval_layout import class_folders, numbered_shards, shards_of, text_lines
from data.eval_reader import class_folders_of, class_names_of, read_labelled, read_pairs, templates_of
from tests.data.faulty_server import FaultyServer, serve
from tests.helpers.shards import draw_image, encode_image


def write_split(root: Path, samples: list[dict[str, bytes]], split: str = "test", num_shards: int = 2) -> Path:
    """CLIP_benchmark's tars of a split, samples dealt out in order."""
    (root / split).mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(samples)), num_shards)):
        with webdataset.TarWriter(str(root / split / f"{number}.tar"), encoder=False) as writer:
            for index in part:
                writer.write({"__key__": f"s{index:07d}", **samples[index]})
    (root / split / "nshards.txt").write_text(f"{num_shards}\n")
    return root


def sample(label: str | bytes, extension: str = "webp") -> dict[str, bytes]:
    content = label if isinstance(label, bytes) else label.encode()
    return {
        extension: encode_image(draw_image(len(content)), "jpg" if extension == "JPG" else extension),
        "cls": content,
    }


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def labels_of(root: str | Path, split: str = "test") -> list[int]:
    batches = read_labelled(str(root), 0, 1, as_tensor, 4, 1, split)
    return [label for batch in batches if batch.labels is not None for label in batch.labels.tolist()]


@pytest.fixture
def web() -> Iterator[FaultyServer]:
    with serve() as server:
        yield server


def publish(server: FaultyServer, root: Path) -> str:
    server.objects.update({f"/set/{p.relative_to(root)}": p.read_bytes() for p in root.rglob("*") if p.is_file()})
    return f"{server.url}/set"


@pytest.mark.parametrize(
    "content",
    [b"fox\nowl\nzebra\n", b"fox\r\nowl\r\nzebra", b"\xef\xbb\xbffox\nowl\nzebra", b"fox  \n\towl\nzebra\n\n\n"],
    ids=["unix", "windows", "byte-order-mark", "spaces-and-empty-end"],
)
def test_class_names_and_templates_do_not_depend_on_who_saved_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classnames.txt").write_bytes(content)
    (tmp_path / "zeroshot_classification_templates.txt").write_bytes(content)
    assert class_names_of(str(tmp_path)) == templates_of(str(tmp_path)) == ["fox", "owl", "zebra"]


def test_an_empty_line_among_class_names_keeps_its_place(tmp_path: Path) -> None:
    """Left out, every class behind it would have the wrong label."""
    (tmp_path / "classnames.txt").write_text("fox\n\nzebra\n")
    assert class_names_of(str(tmp_path)) == ["fox", "", "zebra"]


def test_a_text_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_bytes("fox\nhérisson\n".encode("latin-1"))
    with pytest.raises(DataConfigError, match=r"classnames\.txt: not UTF-8 at byte 5"):
        class_names_of(str(tmp_path))


def test_a_text_file_out_of_reach_may_come_back(tmp_path: Path, web: FaultyServer) -> None:
    web.always = ("status", 403)
    with pytest.raises(DataError, match="classnames") as refused:
        text_lines(f"{web.url}/set", "classnames.txt")
    assert not isinstance(refused.value, DataConfigError)


@pytest.mark.parametrize("content", ["", "three", "0", "-1", "2 3", "<!DOCTYPE html>\n<html>"])
def test_a_number_of_shards_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    root = write_split(tmp_path / "set", [sample("0"), sample("1")])
    (root / "test" / "nshards.txt").write_text(content)
    with pytest.raises(DataConfigError, match=r"test/nshards\.txt: .*is no number of shards"):
        labels_of(root)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ((0, 2), "3 shards, 1 of them missing, the first is 1.tar"),
        ((0, 1, 2, 3, 10), "3 shards, but there is also 3.tar"),
    ],
)
def test_a_folder_with_other_shards_than_it_says_is_refused(
    tmp_path: Path, present: tuple[int, ...], message: str
) -> None:
    for number in present:
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / "test" / f"{number}.tar").touch()
    (tmp_path / "test" / "nshards.txt").write_text("3")
    with pytest.raises(DataError, match=message):
        numbered_shards(str(tmp_path), "test")


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    root = write_split(tmp_path / "set", [sample(str(label)) for label in range(12)], num_shards=12)
    assert labels_of(root) == list(range(12))


def test_at_a_url_a_missing_number_of_shards_and_a_missing_shard_are_named(tmp_path: Path, web: FaultyServer) -> None:
    url = publish(web, write_split(tmp_path / "set", [sample("0"), sample("1")]))
    assert labels_of(url) == [0, 1]
    del web.objects["/set/test/1.tar"]
    with pytest.raises(DataError, match=r"set/test/1\.tar"):
        labels_of(url)
    del web.objects["/set/test/nshards.txt"]
    with pytest.raises(DataError, match=r"no test/nshards\.txt, which says how many tars there are"):
        shards_of(url, "test")


def test_each_split_has_its_own_tars(tmp_path: Path) -> None:
    write_split(tmp_path / "set", [sample("1"), sample("2")])
    root = write_split(tmp_path / "set", [sample(str(label)) for label in (3, 4, 5)], "train", num_shards=3)
    assert (labels_of(root), labels_of(root, "train")) == ([1, 2], [3, 4, 5])


def test_labels_are_taken_as_they_are(tmp_path: Path) -> None:
    root = write_split(tmp_path / "set", [sample(text) for text in ("7\n", " 0", "12\r\n", "7")])
    assert labels_of(root) == [7, 0, 12, 7]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_a_picture_may_have_any_of_the_usual_extensions(tmp_path: Path, extension: str) -> None:
    assert labels_of(write_split(tmp_path / "set", [sample("3", extension)], num_shards=1)) == [3]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"cls": b"3.5"}, r"b'3\.5' is no class number"),
        ({"cls": b""}, "b'' is no class number"),
        ({"json": b'{"cls": 3}'}, "no member 'cls'; members: json, png$"),
        ({"npy": b"..."}, "with several labels an image"),
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path: Path, label: dict[str, bytes], message: str) -> None:
    root = write_split(tmp_path / "set", [{"png": sample("0", "png")["png"], **label}], num_shards=1)
    with pytest.raises(DataError, match=message):
        labels_of(root)


def test_pictures_beside_numbered_tars_are_no_classes(tmp_path: Path) -> None:
    root = write_split(tmp_path / "set", [sample("1"), sample("0")])
    (root / "examples").mkdir()
    draw_image(0).save(root / "examples" / "one.png")
    assert labels_of(root) == [1, 0]
    assert class_names_of(str(root)) is None and class_folders_of(str(root)) == []


def test_folders_that_programs_leave_behind_are_no_classes(tmp_path: Path) -> None:
    for folder in (".ipynb_checkpoints", "__MACOSX", "ant", "bee", "cat"):
        (tmp_path / folder).mkdir()
    for folder in (".ipynb_checkpoints", "cat"):  # a class may have no picture yet
        draw_image(0).save(tmp_path / folder / "one.png")
    assert class_folders(str(tmp_path)) == ["ant", "bee", "cat"]
    assert labels_of(tmp_path) == [2]


def test_captions_are_the_lines_of_the_text(tmp_path: Path) -> None:
    texts = ["a fox\nan animal\n", "an owl", "a zebra\r\nstripes\r\n\r\n"]
    root = write_split(tmp_path / "set", [{"png": sample("0", "png")["png"], "txt": text.encode()} for text in texts])
    batches = read_pairs(str(root), 0, 1, as_tensor, batch_size=4)
    assert [caption for batch in batches for caption in batch.captions or []] == texts
