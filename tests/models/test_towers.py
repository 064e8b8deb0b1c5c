"""What the towers compute, whatever they are: shapes, precision, recomputation, short text, initialisation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import CLIP, ModelConfig, TextConfig, VisionConfig, config_with, create_model, load_model_config
from models.config import PreprocessConfig
from models.row_draws import PatchDropout
from tests.models.conftest import FAMILIES

Build = Callable[[str | ModelConfig], CLIP]


def _inputs(model: CLIP, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, *model.visual.image_size, generator=generator)
    tokens = torch.randint(1, 1000, (batch, model.config.text_cfg.context_length), generator=generator)
    for row, end in enumerate(torch.linspace(2, tokens.shape[1] - 1, batch).long().tolist()):
        tokens[row, end] = 49407
        tokens[row, end + 1 :] = 0
    return image, tokens


def _gradients(model: CLIP, image: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    image_features, text_features, scale = model(image, tokens)
    (scale * image_features @ text_features.T).logsumexp(1).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_have_length_one_in_fp32_under_autocast_too(build: Build, name: str) -> None:
    model = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image_features, text_features, scale = model(*_inputs(model))
    for features in (image_features, text_features):
        assert features.dtype == torch.float32
        assert features.shape == (3, 32)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    assert scale.dtype == torch.float32


def test_either_input_may_be_left_out(build: Build) -> None:
    model = build("tiny-test")
    image, tokens = _inputs(model)
    assert model(image)[1] is None
    assert model(text=tokens)[0] is None
    torch.testing.assert_close(model(image)[0], model.encode_image(image, normalize=True))


def test_a_model_with_a_bias_returns_it(build: Build) -> None:
    config = ModelConfig.from_dict({**load_model_config("tiny-test").to_dict(), "init_logit_bias": -10})
    assert build(config)(*_inputs(build(config)))[3].item() == -10


@pytest.mark.parametrize("name", FAMILIES)
def test_grad_checkpointing_changes_no_gradient_and_no_statistic(build: Build, name: str) -> None:
    plain, recomputing = build(name), build(name)
    recomputing.set_grad_checkpointing()
    inputs = _inputs(plain)
    torch.manual_seed(3)
    expected = _gradients(plain, *inputs)
    torch.manual_seed(3)
    actual = _gradients(recomputing, *inputs)
    assert expected.keys() == actual.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], msg=lambda text, key=key: f"{key}: {text}")
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(recomputing.named_buffers())[key], buffer, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_grad_checkpointing_runs_the_repeated_blocks_twice(build: Build, name: str) -> None:
    model = build(name)
    model.set_grad_checkpointing()
    runs = dict.fromkeys(range(len(model.blocks())), 0)
    for index, block in enumerate(model.blocks()):
        block.register_forward_pre_hook(lambda *_, index=index: runs.update({index: runs[index] + 1}))
    _gradients(model, *_inputs(model))
    # timm leaves the last of its blocks out where recomputing it would save nothing.
    assert set(runs.values()) <= {1, 2}
    assert sum(count == 2 for count in runs.values()) >= len(runs) - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_lists_each_repeated_block_of_both_towers_once(build: Build, name: str) -> None:
    model = build(name)
    names = {id(module): name for name, module in model.named_modules()}
    listed = [names[id(block)] for block in model.blocks()]
    assert len(set(listed)) == len(listed)
    expected = {"tiny-test": 2, "tiny-test-rn": 4, "tiny-test-timm": 9}[name]
    assert sum(name.startswith("visual.") for name in listed) == expected
    assert listed[-2:] == ["transformer.resblocks.0", "transformer.resblocks.1"]


def test_short_text_gives_the_features_of_padded_text(build: Build) -> None:
    model = build("tiny-test")
    _, tokens = _inputs(model)
    tokens[:, 9:] = 0
    tokens[:, 8] = 49407
    with torch.no_grad():
        padded, short = model.encode_text(tokens), model.encode_text(tokens[:, :9])
    torch.testing.assert_close(short, padded, rtol=0, atol=2e-6)


def test_text_longer_than_the_context_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="takes 16 tokens, got 17"):
        build("tiny-test").encode_text(torch.ones(1, 17, dtype=torch.long))


def test_a_tower_that_sees_padding_refuses_short_text(build: Build) -> None:
    config = _with_text(no_causal_mask=True, pool_type="last")
    model = build(config)
    assert not model.text_tower.ignores_padding
    with pytest.raises(ValueError, match="takes 16 tokens, got 9"):
        model.encode_text(torch.ones(1, 9, dtype=torch.long))


def test_an_image_of_another_size_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match=r"\(32, 32\), got \(40, 40\)"):
        build("tiny-test").encode_image(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_need_not_be_square(name: str) -> None:
    model = create_model(name, force_image_size=(64, 96)).eval()
    assert model.visual.image_size == (64, 96)
    assert model(torch.zeros(1, 3, 64, 96))[0].shape == (1, 32)


def test_positions_and_the_temperature_are_declared_free_of_weight_decay(build: Build) -> None:
    declared = {name: build(name).no_weight_decay() for name in FAMILIES}
    text = {"positional_embedding", "logit_scale"}
    assert declared["tiny-test"] == text | {"visual.positional_embedding", "visual.class_embedding"}
    assert declared["tiny-test-rn"] == text | {"visual.attnpool.positional_embedding"}
    assert declared["tiny-test-timm"] == text


def test_patch_dropout_keeps_the_class_token_and_a_fixed_share() -> None:
    dropout = PatchDropout(0.5)
    tokens = torch.arange(17.0).view(1, 17, 1).expand(4, 17, 2)
    kept = dropout(tokens)
    assert kept.shape == (4, 9, 2)
    assert (kept[:, 0] == 0).all()
    assert all(len(set(row.tolist())) == 9 for row in kept[..., 0])
    assert not torch.equal(kept[0], kept[1])
    assert dropout.eval()(tokens) is tokens


def test_patch_dropout_comes_from_the_config_and_acts_in_training_only() -> None:
    model = create_model("tiny-test", force_patch_dropout=0.5)
    image = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model.encode_image(image), model.encode_image(image))
    model.eval()
    assert torch.equal(model.encode_image(image), model.encode_image(image))


def test_models_are_built_without_memory_on_the_meta_device(build: Build) -> None:
    with torch.device("meta"):
        model = build("ViT-bigG-14")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(2539.57e6, rel=1e-5)


def test_building_draws_from_torchs_current_generator(build: Build) -> None:
    first, second = build("tiny-test"), build("tiny-test")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_initial_standard_deviations_follow_the_formulas(build: Build) -> None:
    width, layers, patch = 128, 6, 8
    config = ModelConfig(
        embed_dim=64,
        vision_cfg=VisionConfig(image_size=64, layers=layers, width=width, head_width=32, patch_size=patch),
        text_cfg=TextConfig(context_length=64, vocab_size=2000, width=width, heads=4, layers=layers),
        preprocess=PreprocessConfig(size=64),
    )
    state = build(config).state_dict()
    vision, text = "visual.transformer.resblocks.2.", "transformer.resblocks.2."
    expected = {
        "visual.positional_embedding": width**-0.5,
        "visual.proj": width**-0.5,
        "visual.conv1.weight": (3 * 3 * patch * patch) ** -0.5,
        vision + "attn.in_proj_weight": (2 / (4 * width)) ** 0.5,
        vision + "attn.out_proj.weight": (3 * width) ** -0.5,
        vision + "mlp.c_fc.weight": (3 * width) ** -0.5,
        vision + "mlp.c_proj.weight": (3 * 4 * width) ** -0.5,
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width**-0.5,
        text + "attn.in_proj_weight": width**-0.5,
        text + "attn.out_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        text + "mlp.c_fc.weight": (2 * width) ** -0.5,
        text + "mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
    }
    for key, std in expected.items():
        assert state[key].std().item() == pytest.approx(std, rel=0.03), key
    for prefix in (vision, text):
        assert not state[prefix + "attn.in_proj_bias"].any()
        assert not state[prefix + "attn.out_proj.bias"].any()
        assert state[prefix + "mlp.c_fc.bias"].any()
    assert state["logit_scale"].item() == pytest.approx(2.65926, abs=1e-5)


def _with_text(**settings: object) -> ModelConfig:
    raw = load_model_config("tiny-test").to_dict()
    return config_with(ModelConfig.from_dict({**raw, "text_cfg": {**raw["text_cfg"], **settings}}))
