"""The demo's drawings: deterministic, truthful captions, combinations really held out."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.demo_scenes import COLOURS, SHAPES, DemoSize, combinations, draw_once, held_out, write_demo_data

SIZE = DemoSize(train=60, val=8, evaluation=45, shard=25, pixels=48)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set from seed 0."""
    root = tmp_path_factory.mktemp("demo")
    write_demo_data(root, 0, SIZE)
    return root


def samples(shard: Path) -> list[dict[str, bytes]]:
    """Extension -> content of each sample of a shard."""
    found: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(shard) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            content = tar.extractfile(member)
            assert content is not None
            found[key][extension] = content.read()
    return list(found.values())


def test_every_colour_and_every_shape_lacks_two_partners_in_training() -> None:
    assert len(held_out()) == 20
    assert held_out() < set(combinations())
    colours, shapes = zip(*(name.split() for name in held_out()), strict=True)
    assert Counter(colours) == dict.fromkeys(COLOURS, 2)
    assert Counter(shapes) == dict.fromkeys(SHAPES, 2)


def test_training_never_shows_a_held_out_combination(drawn: Path) -> None:
    for folder in ("train", "val"):
        for shard in sorted((drawn / folder).glob("*.tar")):
            for sample in samples(shard):
                groups = json.loads(sample["json"])["groups"]
                assert not {f"{group['colour']} {group['shape']}" for group in groups} & held_out()


def test_captions_name_what_is_drawn(drawn: Path) -> None:
    counted = {2: "two", 3: "three", 4: "four"}
    for sample in samples(drawn / "train" / "00000.tar"):
        caption = sample["txt"].decode()
        for group in json.loads(sample["json"])["groups"]:
            assert f"{group['colour']} {group['shape']}" in caption
            assert group["size"] in caption
            assert group["position"] in caption
            assert counted.get(group["count"], "") in caption
            assert (group["count"] == 1) == (
                f"{group['shape']}s" not in caption and f"{group['shape']}es" not in caption
            )


def test_the_colour_of_the_caption_is_in_the_picture(drawn: Path) -> None:
    for sample in samples(drawn / "train" / "00000.tar"):
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")).astype(int)
        for group in json.loads(sample["json"])["groups"]:
            distances = np.abs(pixels - COLOURS[group["colour"]]).max(axis=2)
            assert (distances < 60).sum() >= 5


def test_the_zero_shot_set_has_clip_benchmarks_layout_and_only_held_out_images(drawn: Path) -> None:
    root = drawn / "eval"
    names = (root / "classnames.txt").read_text().splitlines()
    assert names == combinations()
    assert (root / "test" / "nshards.txt").read_text().strip() == "2"
    assert all("{c}" in line for line in (root / "zeroshot_classification_templates.txt").read_text().splitlines())
    labels = [int(sample["cls"]) for shard in ("0.tar", "1.tar") for sample in samples(root / "test" / shard)]
    assert len(labels) == SIZE.evaluation
    assert {names[label] for label in labels} == held_out()


def test_sizes_json_counts_the_shards(drawn: Path) -> None:
    assert json.loads((drawn / "train" / "sizes.json").read_text()) == {
        "00000.tar": 25,
        "00001.tar": 25,
        "00002.tar": 10,
    }


def test_the_seed_decides_every_byte(drawn: Path, tmp_path: Path) -> None:
    write_demo_data(tmp_path / "same", 0, SIZE)
    write_demo_data(tmp_path / "other", 1, SIZE)
    for path in ("train/00000.tar", "val/00000.tar", "eval/test/0.tar"):
        assert (tmp_path / "same" / path).read_bytes() == (drawn / path).read_bytes()
        assert (tmp_path / "other" / path).read_bytes() != (drawn / path).read_bytes()


def test_drawing_happens_once_and_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = DemoSize(2, 2, 2, 2, 16)

    def interrupt(root: Path, seed: int, size: DemoSize) -> None:
        (root / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data.demo_scenes.write_demo_data", interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw_once(tmp_path / "demo-data", 0, small)
    assert list(tmp_path.iterdir()) == []
    assert draw_once(tmp_path / "demo-data", 0, small)
    assert not draw_once(tmp_path / "demo-data", 0, small)
