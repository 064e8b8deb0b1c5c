"""The suites that come with the trainer: sets, sizes and names as CLIP_benchmark has them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import yaml

from tests.helpers.process import ROOT
from training.config import DataConfig, EvalConfig
from training.evaluation.specs import specs_of

FILES = sorted((ROOT / "configs" / "eval").glob("*.yaml"))
# A name there that is not that of the set.
CLASSES_OF = {"vtab-caltech101": "caltech101_vtab"}


def sets_of(name: str) -> dict[str, dict[str, Any]]:
    content = yaml.safe_load((ROOT / "configs" / "eval" / f"{name}.yaml").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in content["sets"]}


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_a_suite_says_how_large_each_of_its_sets_is(name: str) -> None:
    for entry in sets_of(name).values():
        size = "num_captions" if entry["task"] == "retrieval" else "num_classes"
        assert entry.keys() == {"name", "task", "num_samples", size, "main"}
        assert entry["num_samples"] >= 500
        if size == "num_classes":
            assert 2 <= entry["num_classes"] <= entry["num_samples"] / 3


def test_a_set_is_the_same_in_every_suite() -> None:
    every = [entry for path in FILES for entry in sets_of(path.stem).values()]
    assert all(entry == other for entry in every for other in every if entry["name"] == other["name"])
    assert sets_of("imagenet").items() <= sets_of("vtab_plus").items()


def test_suites_that_share_sets_measure_them_once() -> None:
    specs = specs_of(EvalConfig(eval_suite=tuple(path.stem for path in FILES)), DataConfig())
    assert len(specs) == 37
    assert {spec.url for spec in specs.values()} == {
        f"https://huggingface.co/datasets/clip-benchmark/wds_{name}/resolve/main" for name in specs
    }


@pytest.mark.parity
@pytest.mark.slow
def test_vtab_plus_and_the_shifts_of_imagenet_are_those_of_clip_benchmark() -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder", reason="compares with clip-benchmark")
    theirs = [name.replace("/", "-") for name in builder.dataset_collection["vtab+"] if "multilabel" not in name]
    assert list(sets_of("vtab_plus")) == theirs
    assert len(theirs) == 35
    assert list(sets_of("imagenet")) == ["imagenet1k", *builder.dataset_collection["imagenet_robustness"]]
    assert sets_of("retrieval").keys() < set(builder.dataset_collection["retrieval"])


@pytest.mark.parity
def test_numbers_of_classes_are_those_of_the_names_that_clip_benchmark_lists() -> None:
    datasets = pytest.importorskip("clip_benchmark.datasets", reason="compares with clip-benchmark")
    names = json.loads(resources.files(datasets).joinpath("en_classnames.json").read_text(encoding="utf-8"))
    compared = []
    for name, entry in sets_of("vtab_plus").items():
        key = CLASSES_OF.get(name, name.removeprefix("vtab-"))
        if key in names:
            compared.append(name)
            assert entry["num_classes"] == len(names[key]), name
    assert len(compared) >= 15
