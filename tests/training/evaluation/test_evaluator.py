"""What a run asks of its evaluation: which sets, under which names, and what happens when it goes wrong."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import models
from tests.helpers.shards import write_shards
from tests.training.evaluation.conftest import write_labelled
from training.config import DataConfig, EvalConfig
from training.distributed import World
from training.errors import ConfigError, DataConfigError, DataError
from training.evaluation import Evaluator

PREPROCESS = models.InferenceTransform(models.load_model_config("tiny-test").preprocess)


def build(sets: EvalConfig, data: DataConfig | None = None, **options: Any) -> Evaluator:
    tokenizer = models.get_tokenizer("tiny-test")
    options = {"batch_size": 4, "workers": 1, "precision": "fp32"} | options
    return Evaluator(sets, data or DataConfig(), tokenizer, PREPROCESS, World(), **options)


def stopper(after: int) -> Callable[[], bool]:
    """Asks to stop from the question number `after` on."""
    asked = iter(range(1_000_000))
    return lambda: next(asked) >= after


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """7 pairs in 2 shards."""
    write_shards(tmp_path / "pairs", [4, 3])
    return str(tmp_path / "pairs" / "shard-{00000..00001}.tar")


def test_figures_have_the_names_of_the_contract(model: models.CLIP, labelled_set: Path, pairs: str) -> None:
    evaluator = build(EvalConfig(zeroshot_data=(f"shapes={labelled_set}",)), DataConfig(val_data=pairs))
    figures = evaluator.evaluate_sets(model, evaluator.labels())
    assert figures is not None
    expected = {
        "shapes-zeroshot-top1",
        "shapes-zeroshot-top5",
        "shapes-zeroshot-mean_per_class_recall",
        "clip_val_loss",
    }
    expected |= {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert {f"val/{name}" for name in expected} <= figures.keys()
    assert figures["val/num_samples"] == 7


def test_imagenet_keeps_openclips_name(model: models.CLIP, labelled_set: Path) -> None:
    evaluator = build(EvalConfig(imagenet_val=str(labelled_set)))
    assert "val/imagenet-zeroshot-val-top1" in (evaluator.evaluate_sets(model, evaluator.labels()) or {})


def test_sets_are_asked_for_in_two_groups(labelled_set: Path, pairs: str) -> None:
    evaluator = build(EvalConfig(zeroshot_data=(f"shapes={labelled_set}",)), DataConfig(val_data=pairs))
    assert evaluator.labels() == ["shapes", "val"]
    assert evaluator.labels(val=False) == ["shapes"]
    assert evaluator.labels(zeroshot=False) == ["val"]


def test_the_log_says_how_long_each_set_took(
    model: models.CLIP, labelled_set: Path, pairs: str, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = build(EvalConfig(zeroshot_data=(f"shapes={labelled_set}",)), DataConfig(val_data=pairs))
    with caplog.at_level(logging.INFO):
        evaluator.evaluate_sets(model, ["shapes", "val"])
    assert re.search(r"evaluated: shapes \d+\.\d s, val \d+\.\d s$", caplog.text, re.MULTILINE)


def test_no_sets_measure_nothing(model: models.CLIP) -> None:
    assert build(EvalConfig()).evaluate_sets(model, []) == {}


def test_the_figures_do_not_depend_on_the_batch_size(model: models.CLIP, labelled_set: Path, pairs: str) -> None:
    sets, data = EvalConfig(zeroshot_data=(f"shapes={labelled_set}",)), DataConfig(val_data=pairs)
    small, large = (build(sets, data, batch_size=size).evaluate_sets(model, ["shapes", "val"]) for size in (3, 64))
    assert small is not None
    assert small == pytest.approx(large, abs=1e-5)


def test_a_stop_ends_the_evaluation_without_figures(model: models.CLIP, labelled_set: Path) -> None:
    evaluator = build(EvalConfig(zeroshot_data=(f"shapes={labelled_set}",)), should_stop=stopper(1))
    model.train()
    assert evaluator.evaluate_sets(model, evaluator.labels()) is None
    assert model.training


def test_two_sets_of_one_name_are_refused(labelled_set: Path) -> None:
    with pytest.raises(ConfigError, match="the name 'shapes' is taken"):
        build(EvalConfig(zeroshot_data=(f"shapes={labelled_set}", f"shapes={labelled_set}")))


def test_a_broken_image_is_named_and_does_not_end_the_training(
    model: models.CLIP, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_labelled(tmp_path / "set", broken=9)
    evaluator = build(EvalConfig(zeroshot_data=(f"shapes={root}",)))
    with caplog.at_level(logging.ERROR):
        assert evaluator.evaluate_sets(model, evaluator.labels()) == {}
    assert "s0000009" in caplog.text
    assert "2.tar" in caplog.text
    with pytest.raises(DataError, match="s0000009"):
        evaluator.evaluate_sets(model, ["shapes"], strict=True)


@pytest.mark.parametrize("gone", ["test/1.tar", "test", "."], ids=["a-shard", "a-split", "the-folder"])
def test_files_that_go_while_a_run_goes_on_do_not_end_it(
    model: models.CLIP, labelled_set: Path, tmp_path: Path, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "pairs" / "test", [4, 3], name="{}.tar")
    (tmp_path / "pairs" / "test" / "nshards.txt").write_text("2")
    sets = EvalConfig(zeroshot_data=(f"shapes={labelled_set}",), retrieval_data=(f"pairs={tmp_path}/pairs",))
    evaluator = build(sets, DataConfig(val_data=f"{tmp_path}/pairs/test/{{0..1}}.tar"))
    for root in (labelled_set, tmp_path / "pairs"):
        path = root / gone
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with caplog.at_level(logging.ERROR):
        assert evaluator.evaluate_sets(model, evaluator.labels()) == {}
    assert caplog.text.count("is left out of this evaluation") == 3


def test_another_number_of_pairs_than_announced_is_an_error(model: models.CLIP, pairs: str) -> None:
    evaluator = build(EvalConfig(), DataConfig(val_data=pairs, val_num_samples=8))
    with pytest.raises(DataConfigError, match=r"^--val-data .*: 7 samples, but --val-num-samples is 8"):
        evaluator.evaluate_sets(model, evaluator.labels())


def test_pairs_that_are_not_there_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"^--val-data .*nowhere\.tar"):
        build(EvalConfig(), DataConfig(val_data=str(tmp_path / "nowhere.tar")))


def test_another_number_of_images_than_the_suite_says_is_an_error_not_a_score(
    model: models.CLIP, labelled_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "suite.yaml").write_text(f"sets: [{{name: shapes, url: {labelled_set}, num_samples: 12}}]\n")
    evaluator = build(EvalConfig(eval_suite=(str(tmp_path / "suite.yaml"),)))
    with pytest.raises(DataConfigError, match=r"^suite\.yaml: shapes: 11 samples, but num_samples is 12"):
        evaluator.evaluate_sets(model, evaluator.labels())


def test_retrieval_sets_and_probes_have_names_of_their_own(
    model: models.CLIP, labelled_set: Path, tmp_path: Path
) -> None:
    (shard,) = write_shards(tmp_path / "coco" / "test", [5], captions=lambda index: f"no {index}\nnumber {index}")
    shard.rename(shard.with_name("0.tar"))
    (tmp_path / "coco" / "test" / "nshards.txt").write_text("1\n")
    shutil.copytree(labelled_set / "test", labelled_set / "train")
    sets = EvalConfig(retrieval_data=(f"coco={tmp_path}/coco",), linear_probe_data=(f"shapes={labelled_set}",))
    evaluator = build(sets)
    figures = evaluator.evaluate_sets(model, evaluator.labels()) or {}
    assert (figures["val/coco-num_samples"], figures["val/coco-num_captions"]) == (5, 10)
    assert {"val/coco-text_to_image_R@5", "val/shapes-linear_probe-top1"} <= figures.keys()


def test_our_own_templates_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_labelled(tmp_path / "set", templates=())
    with caplog.at_level(logging.INFO):
        build(EvalConfig(zeroshot_data=(f"shapes={root}",)))
    assert "shapes: no zeroshot_classification_templates.txt, so 6 templates of our own" in caplog.text
