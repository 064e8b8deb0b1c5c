"""CoCa: the same logits as OpenCLIP's, captions chosen as they should be, gradients everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import CLIP, ConfigError, ModelConfig, build_model, config_with, load_model_config
from models.coca import CoCa
from models.generate import generate
from tests.helpers.large_models import fill

Build = Callable[[str | ModelConfig], CLIP]
START, END = 49406, 49407


def coca() -> CoCa:
    torch.manual_seed(0)
    model = build_model(load_model_config("tiny-test-coca"))
    assert isinstance(model, CoCa)
    return model


def inputs(model: CoCa, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 40_000, (rows, 16), generator=generator)
    tokens[:, 0] = START
    for row, end in enumerate(range(5, 5 + rows)):
        tokens[row, end] = END
        tokens[row, end + 1 :] = 0
    return torch.randn(rows, 3, *model.visual.image_size, generator=generator), tokens


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """OpenCLIP's model of our configuration."""
    open_clip = pytest.importorskip("open_clip", reason="compares with open_clip_torch")
    settings = load_model_config("tiny-test-coca").to_dict()
    settings = {key: settings[key] for key in ("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text")}
    for section in ("vision_cfg", "text_cfg"):
        settings[section]["output_tokens"] = True
    path = tmp_path_factory.mktemp("configs") / "tiny-coca-there.json"
    path.write_text(json.dumps(settings))
    open_clip.add_model_config(path)
    model = open_clip.create_model(path.stem).eval()
    fill(model)
    return model


@pytest.fixture
def ours(theirs: nn.Module) -> CoCa:
    model = coca()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model.eval()


@pytest.mark.parity
@torch.no_grad()
def test_features_and_logits_are_openclips(ours: CoCa, theirs: nn.Module) -> None:
    images, tokens = inputs(ours)
    wanted = theirs(images, tokens)
    image, text, scale, bias, logits = ours(images, tokens)
    assert bias is None and torch.equal(scale, wanted["logit_scale"])
    for mine, name in ((image, "image_features"), (text, "text_features"), (logits, "logits")):
        assert mine.shape == wanted[name].shape
        torch.testing.assert_close(mine, wanted[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens, normalize=True), text)
    torch.testing.assert_close(ours.encode_image(images, normalize=True), image)


@pytest.mark.parity
@torch.no_grad()
def test_greedy_captions_are_those_of_openclips_logits(ours: CoCa, theirs: nn.Module) -> None:
    images, _ = inputs(ours)
    wanted = torch.full((len(images), 1), START)
    for _ in range(9):
        logits = theirs(images, wanted, output_labels=False)["logits"][:, -1]
        wanted = torch.cat([wanted, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert END not in wanted
    assert torch.equal(generate(ours, images, start_id=START, end_id=END, max_tokens=10), wanted)


class Scripted(nn.Module):
    """In place of a decoder: the logits are those given for each position, the same for every image."""

    def __init__(self, logits_LV: Tensor):
        super().__init__()
        self.logits_LV = logits_LV

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.logits_LV[: text.shape[1]].repeat(len(image), 1, 1)


def scripted(*ids: int) -> CoCa:
    model = coca().eval()
    logits = torch.zeros(16, 49_408)
    logits[range(len(ids)), list(ids)] = 9.0
    model.text_decoder = Scripted(logits)  # type: ignore[assignment]
    return model


def test_a_caption_ends_with_its_end_and_others_go_on_with_padding() -> None:
    model = scripted(5, 6, END, 7)
    images, _ = inputs(model)
    found = generate(model, images, start_id=START, end_id=END, max_tokens=12)
    assert found.tolist() == [[START, 5, 6, END]] * 3


def test_a_caption_is_no_shorter_than_asked() -> None:
    model = scripted(END, END, END)
    images, _ = inputs(model)
    found = generate(model, images, start_id=START, end_id=END, max_tokens=12, min_tokens=3)
    assert found.shape[1] == 4 and END not in found[:, :3] and (found[:, 3] == END).all()


def test_only_the_likeliest_are_drawn() -> None:
    model = scripted()
    model.text_decoder.logits_LV[:, [3, 4]] = 20.0  # type: ignore[operator,union-attr]
    model.text_decoder.logits_LV[:, 5] = 18.0  # type: ignore[operator,union-attr]
    images, _ = inputs(model)
    torch.manual_seed(0)
    options = {"start_id": START, "end_id": END, "max_tokens": 16, "temperature": 1.0}
    few = {int(token) for _ in range(4) for token in generate(model, images, top_k=2, **options)[:, 1:].flatten()}
    assert few == {3, 4}
    share = {int(token) for _ in range(4) for token in generate(model, images, top_p=0.9, **options)[:, 1:].flatten()}
    assert share == {3, 4}
    all_of_them = {
        int(token) for _ in range(9) for token in generate(model, images, top_p=1.0, **options)[:, 1:].flatten()
    }
    assert {3, 4, 5} <= all_of_them


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_has_a_gradient_and_recomputation_changes_none(checkpointing: bool) -> None:
    grads = []
    for recompute in (False, checkpointing):
        model = coca().train()
        model.set_grad_checkpointing(recompute)
        image, text, scale, _, logits = model(*inputs(model))
        (image[:, 0].sum() + (scale * text[:, 0]).sum() + logits.logsumexp(dim=-1).mean()).backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_the_output_matrix_is_drawn_and_not_left_to_chance() -> None:
    drawn = coca().text_decoder.text_projection.detach()
    assert float(drawn.std()) == pytest.approx(drawn.shape[0] ** -0.5, rel=0.01)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("text_cfg", {"width": 64}, "multimodal_cfg.width 32: the tokens of text_cfg have width 64"),
        ("vision_cfg", {"attentional_pool": False}, "multimodal_cfg.width 32: the tokens of vision_cfg have width 64"),
        ("vision_cfg", {"attentional_pool": "cascade"}, "vision_cfg.attentional_pool: true is supported"),
        ("vision_cfg", {"layers": [1, 1, 1, 1], "attentional_pool": False}, "CoCa needs a native vision transformer"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "a decoder behind a Hugging Face text tower is not supported"),
    ],
)
def test_towers_without_fitting_tokens_are_refused(section: str, settings: dict[str, object], message: str) -> None:
    raw = load_model_config("tiny-test-coca").to_dict()
    raw[section] = {**raw[section], **settings}
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig.from_dict(raw))


def test_a_configuration_survives_its_way_through_a_file(tmp_path: Path) -> None:
    config = load_model_config("tiny-test-coca")
    path = tmp_path / "stored.json"
    path.write_text(json.dumps(config.to_dict()))
    assert config_with(load_model_config(str(path))) == config
