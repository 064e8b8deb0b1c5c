"""Which sets and weights examples come from, and how it is said that there are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from training.config import DataConfig, EvalConfig
from training.distributed import World
from training.errors import CheckpointError, ConfigError, DataError
from training.evaluation.specs import specs_of
from training.run_report.examples import ClassExamples, PairExamples
from training.run_report.selection import ExampleOptions, choose_sets, find_examples

SPECS = specs_of(
    EvalConfig(zeroshot_data=("a=/a", "b=/b"), retrieval_data=("coco=/coco",), linear_probe_data=("p=/p",)),
    DataConfig(val_data="/val.tar"),
)


def test_the_validation_pairs_and_the_first_classes_are_taken() -> None:
    assert [spec.label for spec in choose_sets(SPECS, None)] == ["val", "a"]


def test_a_set_is_taken_by_its_name_and_pairs_by_their_url() -> None:
    assert [spec.label for spec in choose_sets(SPECS, "coco")] == ["coco"]
    assert [(spec.label, spec.url) for spec in choose_sets(SPECS, "s3://b/flickr.tar")] == [
        ("flickr", "s3://b/flickr.tar"),
        ("a", "/a"),
    ]


def test_a_set_that_is_not_there_or_has_nothing_to_show_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--examples-data cocoa: neither a URL nor a set .*; it has a, b, coco"):
        choose_sets(SPECS, "cocoa")
    with pytest.raises(ConfigError, match="linear_probe has no examples"):
        choose_sets(SPECS, "p-linear_probe")


def test_a_finished_run_shows_pairs_and_classes_of_its_newest_checkpoint(finished_run: Path) -> None:
    found = find_examples(finished_run, ExampleOptions(count=3, pool=10), World())
    pairs, classes = found.shown
    assert found.checkpoint == "epoch_2" and found.missing == ()
    assert isinstance(pairs, PairExamples) and isinstance(classes, ClassExamples)
    assert (len(pairs.pictures), len(pairs.captions)) == (10, 19)  # the first image has one caption, the others two
    assert [query.right.index for query in pairs.by_caption] == [0, 3, 6]
    assert all(pairs.owner[query.right.index] == query.index for query in pairs.by_image)
    assert all(len(query.hits) == 5 for query in (*pairs.by_caption, *pairs.by_image))
    assert classes.num_classes == 7 and len(classes.guesses) == 3


def test_a_run_without_a_checkpoint_or_whose_data_are_gone_says_so(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("epoch_*"))
    found = find_examples(run, ExampleOptions(), World())
    assert found.shown == () and "has no checkpoint yet" in found.missing[0]
    shutil.copytree(finished_run / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("/val/shard", "/gone/shard").replace("/classes", "/gone"))
    found = find_examples(run, ExampleOptions(), World())
    assert found.shown == () and ["gone" in reason for reason in found.missing] == [True, True]


def test_what_was_asked_for_and_is_not_there_is_an_error(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError)):
        find_examples(finished_run, ExampleOptions(checkpoint=str(tmp_path / "none")), World())
    with pytest.raises(DataError):
        find_examples(finished_run, ExampleOptions(data=str(tmp_path / "none.tar")), World())
