"""Small evaluation sets and a small model, shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import webdataset

import models
from tests.helpers.shards import draw_image, encode_image

CLASSES = (
    "red circle",
    "green circle",
    "blue circle",
    "yellow circle",
    "purple circle",
    "orange circle",
    "white circle",
)
TEMPLATES = ("a {c}", "a picture of a {c}")


def write_labelled(
    root: Path,
    counts: Sequence[int] = (5, 4, 2),
    classnames: Sequence[str] = CLASSES,
    templates: Sequence[str] = TEMPLATES,
    label: Callable[[int], int] = lambda index: index % len(CLASSES),
    broken: int | None = None,
) -> Path:
    """A set in CLIP_benchmark's layout, `counts` images in each shard."""
    (root / "test").mkdir(parents=True)
    if classnames:
        (root / "classnames.txt").write_text("\n".join(classnames) + "\n")
    if templates:
        (root / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    (root / "test" / "nshards.txt").write_text(f"{len(counts)}\n")
    index = 0
    for shard, count in enumerate(counts):
        with webdataset.TarWriter(str(root / "test" / f"{shard}.tar"), encoder=False, mtime=0.0) as writer:
            for _ in range(count):
                image = encode_image(draw_image(index), "webp")
                image = image[: len(image) // 2] if index == broken else image
                writer.write({"__key__": f"s{index:07d}", "webp": image, "cls": str(label(index)).encode()})
                index += 1
    return root


@pytest.fixture
def labelled_set(tmp_path: Path) -> Path:
    """11 images of 7 classes in 3 shards."""
    return write_labelled(tmp_path / "labelled")


@pytest.fixture(scope="session")
def model() -> models.CLIP:
    """A model with arbitrary but fixed weights, in training mode."""
    torch.manual_seed(0)
    return models.create_model("tiny-test").train()
