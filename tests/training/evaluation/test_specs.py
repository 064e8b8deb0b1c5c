"""Which sets are asked for, and what their figures are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.config import DataConfig, EvalConfig
from training.errors import ConfigError, DataConfigError
from training.evaluation.specs import Manifest, specs_of
from training.evaluation.suites import list_suites, load_suite

SUITE = """
about: two sets
root: {root}
sets:
  - {{name: shapes, task: zeroshot, num_samples: 11, num_classes: 7, main: mean_per_class_recall}}
  - {{name: coco, task: retrieval, num_captions: 25, main: [text_to_image_R@5, image_to_text_R@5]}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> str:
    (tmp_path / "suite.yaml").write_text(SUITE.format(root="sets/{name}"))
    return str(tmp_path / "suite.yaml")


def suite_of(tmp_path: Path, text: str) -> str:
    (tmp_path / "own.yaml").write_text(text)
    return str(tmp_path / "own.yaml")


def test_every_flag_has_its_stem() -> None:
    specs = specs_of(
        EvalConfig(
            imagenet_val="i",
            imagenet_v2="v",
            zeroshot_data=("a=x",),
            retrieval_data=("coco=y",),
            linear_probe_data=("a=x",),
        ),
        DataConfig(val_data="p.tar"),
    )
    assert {label: spec.figures[0] for label, spec in specs.items()} == {
        "imagenet": "val/imagenet-zeroshot-val-top1",
        "imagenetv2": "val/imagenetv2-zeroshot-val-top1",
        "a": "val/a-zeroshot-top1",
        "coco": "val/coco-image_to_text_R@1",
        "a-linear_probe": "val/a-linear_probe-top1",
        "val": "val/image_to_text_R@1",
    }


def test_a_suite_says_where_its_sets_are_and_how_large(suite: str, tmp_path: Path) -> None:
    shapes, coco = load_suite(suite).specs
    assert shapes.url == f"{tmp_path}/sets/shapes"
    assert shapes.manifest == Manifest(num_samples=11, num_classes=7)
    assert shapes.main_figures == ["val/shapes-zeroshot-mean_per_class_recall"]
    assert coco.main_figures == ["val/coco-text_to_image_R@5", "val/coco-image_to_text_R@5"]


@pytest.mark.parametrize("root", ["s3://bucket/wds_{name}", "s3://bucket/eval/"])
def test_eval_root_wins_over_the_suites_own(suite: str, root: str) -> None:
    urls = [spec.url for spec in load_suite(suite, root).specs]
    assert urls in (
        ["s3://bucket/wds_shapes", "s3://bucket/wds_coco"],
        ["s3://bucket/eval/shapes", "s3://bucket/eval/coco"],
    )


def test_a_set_of_two_suites_is_measured_once(suite: str, tmp_path: Path) -> None:
    second = suite_of(tmp_path, Path(suite).read_text())
    assert list(specs_of(EvalConfig(eval_suite=(suite, second)), DataConfig())) == ["shapes", "coco"]


def test_two_different_sets_of_one_name_are_refused(suite: str) -> None:
    with pytest.raises(ConfigError, match=r"the name 'shapes' is taken by --zeroshot-data shapes=elsewhere"):
        specs_of(EvalConfig(zeroshot_data=("shapes=elsewhere",), eval_suite=(suite,)), DataConfig())


def test_the_name_of_the_validation_set_is_its_own() -> None:
    with pytest.raises(ConfigError, match="'val' is that of --val-data"):
        specs_of(EvalConfig(retrieval_data=("val=x",)), DataConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a mapping with a list `sets`"),
        ("sets: []", "expected a mapping with a list `sets`"),
        ("sets: [{task: zeroshot}]", "set 1: expected a mapping with a name"),
        ("sets: [{name: a}]", "a: no url, and the suite has no root: give --eval-root"),
        ("root: x\nsets: [{name: a, taks: zeroshot}]", "a: unknown key 'taks' (known: name, task"),
        ("root: x\nsets: [{name: a, task: zero-shot}]", "task 'zero-shot' is none of zeroshot, retrieval"),
        ("root: x\nsets: [{name: a, num_samples: 5e4}]", "num_samples is a whole number above 0, got '5e4'"),
        ("root: x\nsets: [{name: a, main: R@1}]", "main 'R@1' is none of top1, top5"),
        ("root: x\nsets: [{name: a/b}]", "name 'a/b'"),
        ("root: x\nsets: [{name: a}, {name: a}]", "'a' stands there twice"),
        ("sets: [", "own.yaml: while parsing"),
    ],
)
def test_a_mistake_in_a_suite_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_suite(suite_of(tmp_path, text))
    assert "own.yaml" in str(raised.value)
    assert message in str(raised.value)


def test_an_unknown_suite_is_refused_with_the_nearest() -> None:
    assert "imagenet" in list_suites()
    with pytest.raises(ConfigError, match=r"unknown suite 'imagenett'; did you mean imagenet\?"):
        load_suite("imagenett")


def test_another_size_than_announced_is_an_error() -> None:
    manifest = Manifest(num_samples=50_000)
    manifest.check("imagenet", num_samples=50_000.0, num_classes=3)
    with pytest.raises(DataConfigError, match="imagenet: 49,999 samples, but num_samples is 50,000"):
        manifest.check("imagenet", num_samples=49_999.0)
