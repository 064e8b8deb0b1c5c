"""Every recipe parses, keeps the rules, plans what its head promises, and can be started with a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.shards import write_shards
from training.cli import parse_args
from training.main import main
from training.plan import make_plan
from training.setup import resolve_model

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs" / "recipes").glob("*.yaml"))
# Ranks of the published runs, and what they saw: global batch, and samples in billions.
PUBLISHED = {
    "convnext_large_d_256": (128, 102_400, 26.1),
    "convnext_large_d_320_ft": (512, 131_072, 2.44),
    "vit_h_14_laion2b": (824, 79_104, 32.0),
    "vit_l_14_336_ft": (128, 32_768, 0.4),
}
TINY = {"convnext": "tiny-test-timm", "vit": "tiny-test", "demo": "tiny-test"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_keeps_the_rules_and_names_a_model(path: Path) -> None:
    config = parse_args(["--config", str(path)])
    assert resolve_model(config).name == config.model.model
    assert config.run.name == path.stem, "the run is named as its recipe"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_plans_the_published_batch_and_samples(name: str) -> None:
    ranks, global_batch, billions = PUBLISHED[name]
    config = parse_args(["--config", str(next(path for path in RECIPES if path.stem == name))])
    assert config.data.train_num_samples is not None
    plan = make_plan(config.optim, config.data.train_num_samples, ranks)
    assert plan.global_batch == global_batch
    assert config.optim.epochs * config.data.train_num_samples == pytest.approx(billions * 1e9, rel=0.01)


def test_the_two_stages_have_the_cards_augmentation_and_regularisation() -> None:
    cards = {"convnext_large_d_256": ("(0.33, 1.0)", 0.35, 0.1), "convnext_large_d_320_ft": ("(0.5, 1.0)", 0.4, 0.0)}
    for name, (scale, erasing, head_dropout) in cards.items():
        config = parse_args(["--config", str(next(path for path in RECIPES if path.stem == name))])
        assert config.image.aug_cfg == ("use_timm=True", f"scale={scale}", f"re_prob={erasing}")
        vision = resolve_model(config).vision_cfg
        assert (vision.timm_drop_path, vision.timm_drop) == (0.1, head_dropout)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_tried_dry_with_a_small_model(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data", [16])
    tiny = ["--model", TINY[path.stem.split("_")[0]], "--force-image-size", "64", "--batch-size", "4", "--epochs", "1"]
    places = ["--train-data", str(tmp_path / "data"), "--train-num-samples", "16", "--workers", "0", "--device", "cpu"]
    flags = [*tiny, *places, "--precision", "fp32", "--warmup", "1", "--dry-run"]
    assert main(["--config", str(path), *flags]) == 0, caplog.text
    assert "nothing refused" in caplog.text
