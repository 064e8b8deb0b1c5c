"""Classifiers that are kept: only of a tower that stands still, and never another than would be built."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from models.locks import Lock, lock_towers
from models.lora import Lora, adapt
from tests.helpers.gloo import run_ranks
from tests.training.evaluation.conftest import write_labelled
from training.config import ClusterConfig, DataConfig, EvalConfig, ModelConfig
from training.distributed import World, session
from training.ema import Ema
from training.evaluation import Evaluator
from training.evaluation.classifier_cache import ClassifierCache, Prompts, fingerprint, stands_still
from training.parallel import parallelize, unwrap

Figures = dict[str, float] | None

PROMPTS: Prompts = (("dog", "cat"), ("a {c}",))
COCA = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 16,
        "head_width": 16,
        "patch_size": 16,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "custom_text": True,
}


def locked_model(unlocked_layers: int = 0) -> models.CLIP:
    torch.manual_seed(0)
    model = models.create_model("tiny-test")
    lock_towers(model, text=Lock(unlocked_layers))
    return model


class Builder:
    """Counts what it is asked for."""

    def __init__(self, classifier: Tensor | None = None):
        self.classifier = torch.arange(6.0).view(3, 2) if classifier is None else classifier
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.classifier


@contextmanager
def text_calls(model: nn.Module) -> Iterator[list[int]]:
    """A list that grows by the batch of each call of the text tower."""
    calls: list[int] = []
    plain = unwrap(model)
    original = plain.encode_text

    def counting(tokens: Tensor, *rest: object, **options: object) -> Tensor:
        calls.append(len(tokens))
        return original(tokens, *rest, **options)  # type: ignore[arg-type]

    plain.encode_text = counting  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del plain.encode_text


def evaluator_on(folder: str, world: World) -> Evaluator:
    return Evaluator(
        EvalConfig(zeroshot_data=(f"shapes={folder}",)),
        DataConfig(),
        models.get_tokenizer("tiny-test"),
        models.InferenceTransform(models.load_model_config("tiny-test").preprocess),
        world,
        batch_size=4,
        workers=1,
        precision="fp32",
    )


# ---- what stands still


@pytest.mark.parametrize("lock", [None, Lock(1), Lock(freeze_norms=False)], ids=["none", "last layer", "norms"])
def test_a_tower_that_is_not_locked_whole_is_built_each_time(lock: Lock | None) -> None:
    model, cache, builder = models.create_model("tiny-test"), ClassifierCache(), Builder()
    lock_towers(model, text=lock)
    for _ in range(2):
        cache.get(model, PROMPTS, builder, World())
    assert builder.calls == 2


def test_one_trainable_parameter_anywhere_in_the_text_tower_is_enough_not_to_keep() -> None:
    model = locked_model()
    assert stands_still(model)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert len(frozen) > 10
    for parameter in frozen:
        parameter.requires_grad_(True)
        assert not stands_still(model)
        parameter.requires_grad_(False)


@pytest.mark.parametrize(("text_rank", "is_still"), [(2, False), (0, True)])
def test_adapters_in_the_text_tower_are_trained_and_one_without_them_stands_still(
    text_rank: int, is_still: bool
) -> None:
    pytest.importorskip("peft", reason="the adapters are peft's")
    model = models.create_model("tiny-test")
    adapt(model, Lora(image_rank=2, text_rank=text_rank))
    assert stands_still(model) is is_still


@pytest.mark.parametrize("kind", ["top level", "module of its own", "CoCa"])
@torch.no_grad()
def test_what_is_not_looked_at_cannot_change_a_text_feature_and_all_else_is_seen(kind: str) -> None:
    torch.manual_seed(0)
    config = models.load_model_config("tiny-test")
    built = {
        "top level": lambda: config,
        "module of its own": lambda: models.ModelConfig.from_dict({**config.to_dict(), "custom_text": True}),
        "CoCa": lambda: models.ModelConfig.from_dict(COCA),
    }[kind]()
    model = models.build_model(built).eval()
    tokens = models.get_tokenizer("tiny-test")(["a dog", "two cats"])[:, : built.text_cfg.context_length]
    tokens[:, -1] = tokens.max()
    features, seen = model.encode_text(tokens), fingerprint(model)
    unseen = []
    for name, parameter in model.named_parameters():
        parameter.mul_(0.5).add_(0.25)
        if fingerprint(model) == seen:
            unseen.append(name)
            assert torch.equal(model.encode_text(tokens), features), name
        seen, features = fingerprint(model), model.encode_text(tokens)
    looked_at = {name for name, _ in model.named_parameters()} - set(unseen)
    assert any("text" in name for name in looked_at) and any("token_embedding" in name for name in looked_at)
    assert not any(name.startswith(("visual.", "logit_scale")) for name in looked_at)


# ---- what is kept


def test_the_classifier_of_a_locked_tower_is_built_once() -> None:
    model, cache, builder = locked_model(), ClassifierCache(), Builder()
    first, second = (cache.get(model, PROMPTS, builder, World()) for _ in range(2))
    assert builder.calls == 1
    assert torch.equal(first, second)


def test_other_class_names_or_templates_are_another_classifier() -> None:
    model, cache, builder = locked_model(), ClassifierCache(), Builder()
    for prompts in (PROMPTS, (PROMPTS[0], ("the {c}",)), (("dog", "cow"), PROMPTS[1])):
        cache.get(model, prompts, builder, World())
    assert builder.calls == 3


@torch.no_grad()
def test_one_changed_bit_in_a_locked_tower_is_noticed() -> None:
    model, cache, builder = locked_model(), ClassifierCache(), Builder()
    cache.get(model, PROMPTS, builder, World())
    weight = model.token_embedding.weight
    weight.view(torch.int32)[5, 1] ^= 1
    cache.get(model, PROMPTS, builder, World())
    assert builder.calls == 2
    weight.view(torch.int32)[5, 1] ^= 1  # Back, and what was built for the other bits is no longer there.
    cache.get(model, PROMPTS, builder, World())
    assert builder.calls == 3


@torch.no_grad()
def test_training_the_image_tower_and_the_temperature_forgets_nothing() -> None:
    model, cache, builder = locked_model(), ClassifierCache(), Builder()
    for _ in range(2):
        cache.get(model, PROMPTS, builder, World())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert builder.calls == 1


def test_what_is_kept_is_bounded() -> None:
    model, cache, builder = locked_model(), ClassifierCache(max_bytes=24), Builder()
    others = (("cow", "owl"), ("a {c}",))
    for prompts in (PROMPTS, others, PROMPTS, others):
        cache.get(model, prompts, builder, World())
    assert builder.calls == 1 + 2


# ---- in an evaluation


def test_evaluations_call_the_text_tower_once_and_give_the_figures_that_they_give_without(tmp_path: Path) -> None:
    folder = str(write_labelled(tmp_path / "set"))
    model, evaluator = locked_model(), evaluator_on(folder, World())
    for round_ in range(3):
        with torch.no_grad():
            model.visual.proj.add_(0.01 * round_)
        with text_calls(model) as calls:
            kept = evaluator.evaluate_sets(model, ["shapes"])
        assert len(calls) == (1 if round_ == 0 else 0)
        assert kept == evaluator_on(folder, World()).evaluate_sets(model, ["shapes"])


def test_averaged_weights_share_the_classifier_of_a_locked_tower_and_of_no_other(tmp_path: Path) -> None:
    folder = str(write_labelled(tmp_path / "set"))
    for unlocked_layers, num_calls in ((0, 1), (1, 2)):
        model, evaluator = locked_model(unlocked_layers), evaluator_on(folder, World())
        ema = Ema(model, half_life=8)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        with text_calls(model) as calls:
            evaluator.evaluate_sets(model, ["shapes"])
            with ema.in_place_of_weights():
                averaged = evaluator.evaluate_sets(model, ["shapes"])
                alone = copy.deepcopy(model)
        assert len(calls) == num_calls
        assert averaged == evaluator_on(folder, World()).evaluate_sets(alone, ["shapes"])


# ---- on two ranks


@dataclass
class Seen:
    """Of two evaluations: calls of the text tower, figures, and those without a cache."""

    calls: list[int]
    figures: list[Figures]
    without: Figures


def evaluate_twice(world: World, folder: str, fsdp: bool) -> Seen:
    cluster = ClusterConfig(device="cpu", fsdp=fsdp)
    model = parallelize(locked_model(), ModelConfig(precision="fp32"), cluster, world)
    evaluator, calls, figures = evaluator_on(folder, world), [], []
    for _ in range(2):
        with text_calls(model) as made:
            figures.append(evaluator.evaluate_sets(model, ["shapes"]))
        calls.append(len(made))
    return Seen(calls, figures, evaluator_on(folder, world).evaluate_sets(model, ["shapes"]))


def changed_on_one_rank(world: World) -> int:
    """How often a rank builds when only the tower of the other one has changed."""
    model, cache, builder = locked_model(), ClassifierCache(), Builder()
    cache.get(model, PROMPTS, builder, world)
    if world.rank == 1:
        with torch.no_grad():
            model.token_embedding.weight[0, 0] += 1
    cache.get(model, PROMPTS, builder, world)
    return builder.calls


def on_rank(folder: str) -> tuple[Seen, Seen, int]:
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    with session(ClusterConfig(device="cpu")) as world:
        ddp, fsdp = (evaluate_twice(world, folder, fsdp) for fsdp in (False, True))
        return ddp, fsdp, changed_on_one_rank(world)


def test_two_ranks_keep_what_one_keeps_and_build_together(tmp_path: Path) -> None:
    folder = str(write_labelled(tmp_path / "set"))
    torch.set_num_threads(1)
    alone = evaluator_on(folder, World()).evaluate_sets(locked_model(), ["shapes"])
    for *wrapped, num_built in run_ranks(on_rank, 2, folder):
        for seen in wrapped:
            assert seen.calls == [1, 0]
            assert seen.figures == [seen.without, seen.without] == [alone, alone]
        assert num_built == 2
