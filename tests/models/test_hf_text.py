"""Text towers of transformers equal OpenCLIP's, and train like any other; nothing of them is downloaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import CLIP, ConfigError, ModelConfig, build_model, create_model, load_model_config
from models.hf_text import POOLERS, HFTextTower
from models.layer_groups import text_groups
from tests.helpers.hf import KINDS, VOCABULARY, WIDTH, hf_model, save_encoder

POOLERS_OF_OPENCLIP = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder(kind)`: where a tiny encoder of that kind is described."""
    root = tmp_path_factory.mktemp("encoders")
    return lambda kind: root / kind if (root / kind).is_dir() else save_encoder(root / kind, kind)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def _tokens(pad: int, lengths: tuple[int, ...] = (3, 16, 9), width: int = 16) -> Tensor:
    drawn = torch.randint(4, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], drawn, pad)


def _built(config: ModelConfig) -> CLIP:
    torch.manual_seed(0)
    return build_model(config)


def _tower(config: ModelConfig) -> HFTextTower:
    tower = _built(config).eval().text_tower
    assert isinstance(tower, HFTextTower)
    return tower


def _openclip(config: ModelConfig) -> Any:
    model = pytest.importorskip("open_clip.model", reason="compares with open_clip_torch")
    raw = config.to_dict()
    return model.CustomTextCLIP(raw["embed_dim"], raw["vision_cfg"], raw["text_cfg"]).eval()


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("pooler", POOLERS_OF_OPENCLIP)
def test_keys_and_features_equal_openclips_on_the_same_weights(
    folder: Folder, kind: str, projection: str, pooler: str
) -> None:
    config = hf_model(folder(kind), hf_proj_type=projection, hf_pooler_type=pooler)
    ours, theirs = _built(config).eval(), _openclip(config)
    assert list(ours.text.state_dict()) == list(theirs.text.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = _tokens(ours.text_tower.pad_id)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=0, atol=1e-5)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_openclips_initial_text_tower(folder: Folder, kind: str) -> None:
    config = hf_model(folder(kind))
    ours = HFTextTower
    hf = pytest.importorskip("open_clip.hf_model", reason="compares with open_clip_torch")
    torch.manual_seed(5)
    own = ours(config.text_cfg, config.embed_dim).state_dict()
    torch.manual_seed(5)
    text = config.text_cfg
    theirs = hf.HFTextEncoder(
        text.hf_model_name, config.embed_dim, None, text.hf_pooler_type, text.hf_proj_type, pretrained=False
    )
    assert all(torch.equal(own[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_belongs_to_one_group_of_layers(folder: Folder, kind: str) -> None:
    model = _built(hf_model(folder(kind), hf_pooler_type="cls_pooler"))
    groups = text_groups(model)
    assert sorted(name for group in groups for name in group) == sorted(
        f"text.{name}" for name, _ in model.text.named_parameters()
    )
    assert len(groups) == 4, "embeddings, two blocks, projection"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_padding_does_not_reach_the_features(folder: Folder, kind: str, pooler: str) -> None:
    tower = _tower(hf_model(folder(kind), hf_pooler_type=pooler))
    tokens = _tokens(tower.pad_id, lengths=(5, 5))
    with torch.no_grad():
        torch.testing.assert_close(tower(tokens), tower(tokens[:, :5]), rtol=0, atol=1e-5)


def test_the_maximum_is_taken_over_text_alone(folder: Folder) -> None:
    tower = _tower(hf_model(folder("roberta"), hf_pooler_type="max_pooler", hf_proj_type="linear"))
    tokens = _tokens(tower.pad_id)
    with torch.no_grad():
        hidden = tower.transformer(tokens, attention_mask=(tokens != tower.pad_id).long()).last_hidden_state
        expected = tower.proj(torch.stack([row[:n].amax(0) for row, n in zip(hidden, (3, 16, 9), strict=True)]))
        torch.testing.assert_close(tower(tokens), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_blocks_changes_no_gradient_though_they_drop(folder: Folder, kind: str) -> None:
    model = _built(hf_model(folder(kind))).train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    tokens, runs = _tokens(model.text_tower.pad_id), []
    for block in again.text_tower.text_blocks():
        inside = next(module for module in block.modules() if isinstance(module, nn.Linear))
        inside.register_forward_pre_hook(lambda *_: runs.append(1))
    for one in (model, again):
        torch.manual_seed(1)
        one(text=tokens)[1][:, 0].sum().backward()
    assert len(runs) == 4, "both blocks run twice"
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_locked_tower_that_recomputes_asks_for_no_gradient(folder: Folder, kind: str) -> None:
    model = _built(hf_model(folder(kind))).train()
    model.set_grad_checkpointing()
    model.text.requires_grad_(False)
    assert not model.encode_text(_tokens(model.text_tower.pad_id)).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained(folder: Folder, kind: str) -> None:
    """DDP waits for the gradients of all of them."""
    model = _built(hf_model(folder(kind), hf_pooler_type="cls_pooler")).train()
    model(text=_tokens(model.text_tower.pad_id))[1][:, 0].sum().backward()
    assert not [name for name, one in model.text.named_parameters() if one.grad is None]


def test_it_is_made_without_memory_too(folder: Folder) -> None:
    with torch.device("meta"):
        model = build_model(hf_model(folder("mt5")))
    assert {one.device.type for one in model.parameters()} == {"meta"}


def test_parameters_are_fp32_whatever_the_published_ones_are(tmp_path: Path) -> None:
    config = hf_model(save_encoder(tmp_path, "roberta", dtype="float16"))
    assert {one.dtype for one in _built(config).parameters()} == {torch.float32}


def test_an_encoder_of_the_right_width_needs_no_projection(folder: Folder) -> None:
    raw = hf_model(folder("bert")).to_dict()
    raw["text_cfg"]["hf_proj_type"] = None  # as OpenCLIP writes it
    tower = _tower(ModelConfig.from_dict({**raw, "embed_dim": WIDTH}))
    assert not list(tower.proj.parameters())
    assert tower.text_config.hf_proj_type == "none"


@pytest.mark.parametrize("kind", KINDS)
def test_published_weights_are_those_of_the_folder(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf")
    config = hf_model(save_encoder(tmp_path, kind, weights=True), hf_model_pretrained=True)
    (path := tmp_path / "model.json").write_text(_json(config))
    model = create_model(str(path)).eval()
    published = transformers.AutoModel.from_pretrained(tmp_path)
    expected = (published.encoder if published.config.is_encoder_decoder else published).state_dict()
    own = model.text.transformer.state_dict()
    assert own and all(torch.equal(value, expected[key]) for key, value in own.items())


def _json(config: ModelConfig) -> str:
    return json.dumps({key: value for key, value in config.to_dict().items() if key != "name"})


def test_weights_that_are_not_there_are_an_error_with_the_way_out(folder: Folder, tmp_path: Path) -> None:
    (path := tmp_path / "model.json").write_text(_json(hf_model(folder("roberta"), hf_model_pretrained=True)))
    with pytest.raises(ConfigError, match=r"weights of .*roberta cannot be loaded.*hf_model_pretrained false"):
        create_model(str(path))


def test_an_encoder_that_is_not_on_this_machine_says_what_to_download(offline: None) -> None:
    with pytest.raises(ConfigError, match=r"google/mt5-base is not on this machine.*`hf download google/mt5-base`"):
        build_model(load_model_config("mt5-base-ViT-B-32"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"hf_pooler_type": "mean"}, "hf_pooler_type: 'mean' is none of mean_pooler, max_pooler"),
        ({"hf_proj_type": "square"}, "hf_proj_type: 'square' is none of linear, mlp, none"),
        ({"hf_proj_type": "none"}, "needs an encoder of embed_dim 24, this one has 32"),
        ({"context_length": 39}, "context_length 39: .* has 38 positions"),
    ],
)
def test_settings_that_fit_no_encoder_are_refused(folder: Folder, text: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(hf_model(folder("roberta"), **text))


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="is a gpt2; known are roberta, xlm-roberta, bert, mt5, m2m_100"):
        build_model(hf_model(tmp_path))


def test_text_is_run_whole(folder: Folder) -> None:
    tower = _tower(hf_model(folder("roberta")))
    assert not tower.ignores_padding
    with pytest.raises(ValueError, match="takes whole rows"):
        tower.plan_text(_tokens(1))
    with pytest.raises(ValueError, match="takes 16 tokens, got 17"):
        tower(_tokens(1, width=17))
