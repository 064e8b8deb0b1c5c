"""Sets as users have them on disk: what is understood, and what is refused with what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.shards import draw_image
from tests.training.evaluation.conftest import CLASSES, TEMPLATES, write_labelled
from training.config import DataConfig, EvalConfig
from training.errors import ConfigError, DataConfigError
from training.evaluation import DEFAULT_TEMPLATES, sets
from training.evaluation.specs import SetSpec, specs_of, split_name


def spec_of(**settings: Any) -> SetSpec:
    """The one set of these settings."""
    (spec,) = specs_of(EvalConfig(**settings), DataConfig()).values()
    return spec


def open_labelled_set(entry: str) -> sets.LabelledSet:
    return sets.open_labelled_set(spec_of(zeroshot_data=(entry,)))


def open_imagenet(folder: str) -> sets.LabelledSet:
    return sets.open_labelled_set(spec_of(imagenet_val=folder))


def write_folders(root: Path, names: tuple[str, ...]) -> Path:
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        draw_image(index).save(root / name / "one.jpg")
    return root


def test_names_and_templates_come_from_the_set(labelled_set: Path) -> None:
    found = open_labelled_set(f"shapes={labelled_set}")
    assert (found.spec.name, found.spec.stem) == ("shapes", "shapes-zeroshot-")
    assert found.has_own_templates
    assert (found.classnames, found.templates) == (CLASSES, TEMPLATES)


def test_without_a_name_the_folder_gives_it(labelled_set: Path) -> None:
    assert open_labelled_set(f"{labelled_set}/").spec.name == "labelled"


def test_without_templates_ours_are_taken(tmp_path: Path) -> None:
    root = write_labelled(tmp_path / "set", templates=())
    found = open_labelled_set(f"set={root}")
    assert found.templates == DEFAULT_TEMPLATES
    assert not found.has_own_templates


@pytest.mark.parametrize("spec", ["=folder", "a b=folder", "name=", "/"])
def test_a_name_that_cannot_be_a_metric_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="write name=folder"):
        split_name(spec, "--zeroshot-data")


def test_an_equals_sign_in_a_url_is_not_a_name() -> None:
    assert split_name("s3://bucket/a=b/set", "--zeroshot-data") == ("set", "s3://bucket/a=b/set")


def test_a_set_without_class_names_is_refused(tmp_path: Path) -> None:
    root = write_labelled(tmp_path / "set", classnames=())
    with pytest.raises(ConfigError, match=r"no class names; classnames.txt holds one name a line"):
        open_labelled_set(f"set={root}")


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path: Path) -> None:
    root = write_labelled(tmp_path / "set", templates=("a photo of a {c}", "a photo"))
    with pytest.raises(ConfigError, match=r"'a photo' has no place for the class name"):
        open_labelled_set(f"set={root}")


def test_a_label_beyond_the_names_is_refused_at_the_start(tmp_path: Path) -> None:
    root = write_labelled(tmp_path / "set", label=lambda index: index + 6)
    with pytest.raises(DataConfigError, match=r"7 names in classnames\.txt; labels run from 0 to 6"):
        open_labelled_set(f"set={root}")


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    root = write_labelled(tmp_path / "set", counts=(0,))
    with pytest.raises(DataConfigError, match="empty"):
        open_labelled_set(f"set={root}")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=f"there is no folder {tmp_path}/nowhere"):
        open_labelled_set(f"set={tmp_path}/nowhere")


def test_a_shard_that_is_not_there_is_refused(labelled_set: Path) -> None:
    (labelled_set / "test" / "0.tar").unlink()
    with pytest.raises(DataConfigError, match=r"^--zeroshot-data shapes=.*0\.tar"):
        open_labelled_set(f"shapes={labelled_set}")


def test_an_image_folder_needs_a_name_for_each_class(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set", ("cat", "dog", "owl"))
    assert open_labelled_set(f"set={root}").classnames == ("cat", "dog", "owl")
    (root / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(DataConfigError, match=r"2 names in classnames\.txt, but 3 folders"):
        open_labelled_set(f"set={root}")


def test_imagenet_folders_get_timms_names(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "val", ("n01443537", "n01440764", "n02012849"))
    found = open_imagenet(str(root))
    assert found.spec.figures[0] == "val/imagenet-zeroshot-val-top1"
    # Two classes are called crane: both get all their synonyms.
    assert found.classnames[:2] == ("tench", "goldfish")
    assert found.classnames[2].startswith("crane") or "," in found.classnames[2]


def test_a_folder_that_is_no_imagenet_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n99999999 is none of the 1000 classes"):
        open_imagenet(str(write_folders(tmp_path / "val", ("n01440764", "n99999999"))))
