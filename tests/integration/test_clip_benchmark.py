"""The figures of a trained model are CLIP_benchmark's own, which reads the same files and an export of the weights.

What it does otherwise is said where it shows: accuracy among the first five of fewer classes is not defined there.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.demo_scenes import COLOURS, TEMPLATES, DemoSize, Scene, combinations, draw, training_scene, write_demo_data
from data.randomness import KeyedRandom
from scripts import evaluate, export
from tests.helpers.clip_benchmark import benchmark
from training.main import main

pytestmark = [pytest.mark.parity, pytest.mark.slow]
pytest.importorskip("clip_benchmark", reason="compares with clip-benchmark")

FORMATS = (("jpg", "RGB"), ("webp", "RGB"), ("png", "RGBA"), ("jpeg", "L"), ("png", "P"))
SHARDS = (64, 1, 150, 86)  # neither they nor their sum divide a batch
FLAGS = [
    *("--model", "tiny", "--precision", "fp32", "--device", "cpu", "--batch-size", "64", "--workers", "0"),
    *("--epochs", "3", "--lr", "1e-3", "--warmup", "10", "--progress", "lines"),
]


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and the folder that OpenCLIP reads its model from."""

    checkpoint: Path
    exported: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model that has learnt a little: often right, and often wrong."""
    folder = tmp_path_factory.mktemp("trained")
    write_demo_data(folder / "data", 0, DemoSize(train=1024, val=1, evaluation=1, pixels=64))
    data = ["--train-data", str(folder / "data" / "train"), "--logs", str(folder), "--name", "run"]
    assert main([*FLAGS, *data]) == 0
    checkpoint = folder / "run" / "checkpoints" / "epoch_3"
    assert export.main(["--to", "openclip", str(checkpoint), str(folder / "out")]) == 0
    return Trained(checkpoint, folder / "out" / "openclip")


def test_zero_shot_classification_is_that_of_clip_benchmark(trained: Trained, tmp_path: Path) -> None:
    classes = combinations()
    root = write_labelled(
        tmp_path / "shapes", classes, TEMPLATES, [classes.index(s.groups[0].combination) for s in scenes()]
    )
    theirs = benchmark("zeroshot_classification", root, trained.exported, tmp_path / "theirs.json")
    ours = figures(trained, tmp_path, "--zeroshot-data", f"shapes={root}")
    assert 0.05 < theirs["acc1"] < theirs["acc5"] < 0.95, "a model that is always or never right compares nothing"
    assert ours["val/shapes-zeroshot-top1"] == theirs["acc1"]
    assert ours["val/shapes-zeroshot-top5"] == theirs["acc5"]
    # The same terms, summed up in another order.
    assert ours["val/shapes-zeroshot-mean_per_class_recall"] == pytest.approx(
        theirs["mean_per_class_recall"], rel=1e-14
    )
    assert ours["val/shapes-zeroshot-mean_per_class_recall"] != ours["val/shapes-zeroshot-top1"]


def test_of_fewer_than_five_classes_top5_is_one_here_and_not_a_number_there(trained: Trained, tmp_path: Path) -> None:
    names = list(COLOURS)[:4]
    labels = [names.index(colour) if (colour := s.groups[0].colour) in names else None for s in scenes()]
    root = write_labelled(tmp_path / "colours", names, ["a {c} shape", "{c}"], labels)
    theirs = benchmark("zeroshot_classification", root, trained.exported, tmp_path / "theirs.json")
    ours = figures(trained, tmp_path, "--zeroshot-data", f"colours={root}")
    assert 0.3 < theirs["acc1"] < 1
    assert ours["val/colours-zeroshot-top1"] == theirs["acc1"]
    assert math.isnan(theirs["acc5"]) and ours["val/colours-zeroshot-top5"] == 1


def test_retrieval_with_several_captions_an_image_is_that_of_clip_benchmark(trained: Trained, tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "pairs")
    recalls = ("--recall_k", "1", "5", "10")
    theirs = benchmark("zeroshot_retrieval", root, trained.exported, tmp_path / "theirs.json", *recalls)
    ours = figures(trained, tmp_path, "--retrieval-data", f"pairs={root}")
    assert 0.01 < theirs["text_retrieval_recall@1"] < theirs["image_retrieval_recall@10"] < 0.95
    for k in (1, 5, 10):
        # Their mean is taken in float32.
        assert np.float32(ours[f"val/pairs-text_to_image_R@{k}"]) == np.float32(theirs[f"image_retrieval_recall@{k}"])
        assert np.float32(ours[f"val/pairs-image_to_text_R@{k}"]) == np.float32(theirs[f"text_retrieval_recall@{k}"])


def figures(trained: Trained, folder: Path, *sets: str) -> dict[str, float]:
    """What `scripts.evaluate` finds."""
    command = ["--checkpoint", str(trained.checkpoint), "--device", "cpu", "--batch-size", "24", "--workers", "1"]
    assert evaluate.main([*command, "--json", str(folder / "ours.json"), *sets]) == 0
    return dict(json.loads((folder / "ours.json").read_text()))


@functools.cache
def scenes() -> list[Scene]:
    """One for each sample of `SHARDS`, no two with the same caption: equal texts would be equally near."""
    found: dict[str, Scene] = {}
    indices = itertools.count()
    while len(found) < sum(SHARDS):
        scene = training_scene(KeyedRandom("agreement", next(indices)))
        found.setdefault(scene.caption, scene)
    return list(found.values())


def picture_of(scene: Scene, index: int) -> dict[str, bytes]:
    """Content by extension: formats, colour modes, sizes and aspect ratios take turns."""
    random = KeyedRandom("agreement", "picture", index)
    extension, mode = FORMATS[index % len(FORMATS)]
    image = draw(scene, random, 40 + 13 * (index % 9))
    image = image.resize((image.width, int(image.height * random.uniform(0.7, 1.5)))).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[f".{extension}"], lossless=True)
    return {extension: buffer.getvalue()}


def write_labelled(root: Path, names: Sequence[str], templates: Sequence[str], labels: Sequence[int | None]) -> Path:
    """CLIP_benchmark's layout, its text files as another machine may have left them. No label, no sample."""
    rows = [(*pair, index) for index, pair in enumerate(zip(scenes(), labels, strict=True)) if pair[1] is not None]
    _write_shards(root, [picture_of(scene, index) | {"cls": f"{label}\n".encode()} for scene, label, index in rows])
    (root / "classnames.txt").write_bytes("".join(f"{name} \r\n" for name in names).encode())
    (root / "zeroshot_classification_templates.txt").write_bytes("\r\n".join(templates).encode())
    return root


def write_pairs(root: Path) -> Path:
    """The same for retrieval, with one to four captions a picture."""
    phrases = ("{}", "a photo of {}", "here you see {}", "{}, drawn")
    samples = []
    for index, scene in enumerate(scenes()):
        captions = [phrase.format(scene.caption) for phrase in phrases[: 1 + index % len(phrases)]]
        samples.append(picture_of(scene, index) | {"txt": "\n".join(captions).encode()})
    _write_shards(root, samples)
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


def _write_shards(root: Path, samples: Sequence[dict[str, bytes]]) -> None:
    (root / "test").mkdir(parents=True)
    rows = iter(enumerate(samples))
    for number, count in enumerate(SHARDS):
        with webdataset.TarWriter(str(root / "test" / f"{number}.tar"), encoder=False) as writer:
            for index, sample in itertools.islice(rows, count):
                writer.write({"__key__": f"s{index:07d}", **sample})
    (root / "test" / "nshards.txt").write_text(f"{len(SHARDS)}\n")
