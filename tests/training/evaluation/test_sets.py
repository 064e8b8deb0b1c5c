"""Sets as users have them on disk: what is understood, and what is refused with what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.shards import draw_image
from tests.training.evaluation.conftest import CLASSES, TEMPLATES, write_labelled
from training.config import DataConfig, EvalConfig
from training.errors import ConfigError, DataConfigError, DataError
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


def test_storage_that_does_not_answer_may_do_so_later() -> None:
    """Exit code 1, so that a job is requeued."""
    with pytest.raises(DataError, match=r"^--zeroshot-data away=http://127\.0\.0\.1:9/set: ") as raised:
        open_labelled_set("away=http://127.0.0.1:9/set")
    assert raised.value.exit_code == 1


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


def test_imagenet_may_have_openclips_prompts(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "val", ("n01440764", "n02012849"))
    found = sets.open_labelled_set(spec_of(imagenet_val=str(root), imagenet_prompts="openclip"))
    assert found.classnames == ("tench", "crane bird")
    assert len(found.templates) == 80
    assert found.has_own_templates


def test_a_folder_that_is_no_imagenet_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n99999999 is none of the 1000 classes"):
        open_imagenet(str(write_folders(tmp_path / "val", ("n01440764", "n99999999"))))


def test_a_list_of_pictures_and_labels_is_a_set(tmp_path: Path) -> None:
    for index in range(4):
        draw_image(index).save(tmp_path / f"{index}.png")
    rows = "".join(f"{index}.png,{('dog', 'cat')[index % 2]}\n" for index in range(4))
    (tmp_path / "labels.csv").write_text(f"filepath,label\n{rows}")
    found = open_labelled_set(str(tmp_path / "labels.csv"))
    assert (found.spec.name, found.classnames) == ("labels", ("cat", "dog"))
    (batch,) = found.read(0, 1, lambda image: torch.zeros(3), 8, 1)
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 1, 0]
    (tmp_path / "classnames.txt").write_text("dog\ncat\n")
    assert open_labelled_set(str(tmp_path / "labels.csv")).classnames == ("dog", "cat")


def test_a_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    draw_image(0).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("filepath,label\na.png,owl\n")
    (tmp_path / "classnames.txt").write_text("dog\ncat\n")
    with pytest.raises(DataConfigError, match=r"'owl' is neither a number nor one of the 2 class names"):
        open_labelled_set(str(tmp_path / "labels.csv"))


def test_an_image_folder_may_have_splits(tmp_path: Path) -> None:
    write_folders(tmp_path / "set" / "train", ("cat", "dog"))
    write_folders(tmp_path / "set" / "val", ("cat", "dog"))
    spec = spec_of(linear_probe_data=(f"pets={tmp_path / 'set'}",))
    found = sets.open_labelled_set(spec, splits=("train", "test"))
    assert found.classnames == ("cat", "dog")


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "set" / "train", ("cat", "owl"))
    write_folders(tmp_path / "set" / "test", ("cat", "dog"))
    with pytest.raises(DataConfigError, match="train and test are not the same classes; 'dog' is in only one"):
        sets.open_labelled_set(spec_of(linear_probe_data=(f"pets={tmp_path / 'set'}",)), splits=("train", "test"))


def test_a_probe_needs_a_training_split(labelled_set: Path) -> None:
    spec = spec_of(linear_probe_data=(f"shapes={labelled_set}",))
    with pytest.raises(DataConfigError, match=r"^--linear-probe-data shapes=.*found neither train/nshards\.txt"):
        sets.open_labelled_set(spec, splits=("train", "test"))


@pytest.mark.parametrize("kind", ["list", "folders", "tars"])
def test_a_set_without_splits_is_not_probed_on_what_it_was_fitted_on(tmp_path: Path, kind: str) -> None:
    if kind == "list":
        draw_image(0).save(tmp_path / "a.png")
        (tmp_path / "set.csv").write_text("filepath,label\na.png,cat\n")
    elif kind == "folders":
        write_folders(tmp_path / "set", ("cat", "dog"))
    else:
        (write_labelled(tmp_path / "set", counts=(3,)) / "test" / "0.tar").rename(tmp_path / "set" / "0.tar")
    url = tmp_path / ("set.csv" if kind == "list" else "set")
    with pytest.raises(DataConfigError, match=r"no split 'train'|neither train/nshards\.txt"):
        sets.open_labelled_set(spec_of(linear_probe_data=(f"set={url}",)), splits=("train", "test"))


def test_folders_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set", tuple(str(number) for number in range(12)))
    assert open_labelled_set(f"digits={root}").classnames == tuple(str(number) for number in range(12))


def test_imagenet_v2s_thousand_numbers_get_timms_names(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / "v2" / str(number)).mkdir(parents=True)
    draw_image(0).save(tmp_path / "v2" / "0" / "one.jpg")
    found = sets.open_labelled_set(spec_of(imagenet_v2=str(tmp_path / "v2")))
    assert found.classnames[:2] == ("tench", "goldfish")


def test_names_and_templates_may_be_files_elsewhere(tmp_path: Path) -> None:
    write_folders(tmp_path / "sets" / "pets", ("n1", "n2"))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "templates.txt").write_text("my {c}\n")
    entry = "{name: pets, classnames: names.txt, templates: templates.txt, num_classes: 2}"
    (tmp_path / "suite.yaml").write_text(f"root: sets\nsets: [{entry}]\n")
    found = sets.open_labelled_set(spec_of(eval_suite=(str(tmp_path / "suite.yaml"),)))
    assert (found.classnames, found.templates) == (("cat", "dog"), ("my {c}",))


def test_another_number_of_classes_than_announced_is_refused_at_the_start(labelled_set: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(f"sets: [{{name: shapes, url: {labelled_set}, num_classes: 8}}]\n")
    with pytest.raises(DataConfigError, match=r"suite\.yaml: shapes: 7 classes, but num_classes is 8"):
        sets.open_labelled_set(spec_of(eval_suite=(str(tmp_path / "suite.yaml"),)))
