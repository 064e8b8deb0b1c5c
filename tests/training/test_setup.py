"""What the settings make of a model, before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import models
from models.row_draws import RowDropout, RowDropPath, row_keys
from tests.helpers.gloo import run_ranks
from training.checkpoint import Checkpointer
from training.checkpoint_content import Progress as Done
from training.config import ClusterConfig, DataConfig, TrainConfig
from training.config import ModelConfig as ModelSection
from training.distributed import World, session
from training.errors import ConfigError
from training.learner import build_learner
from training.optimizer import parameter_names
from training.optimizer_state import optimizer_to_tensors
from training.plan import make_plan
from training.setup import Samples, build_transform, cuts_padding, load_start, loader_config, resolve_model
from training.start import Fresh, Resume


def _model(**text: object) -> models.ModelConfig:
    raw = models.load_model_config("tiny-test").to_dict()
    return models.ModelConfig.from_dict({**raw, "text_cfg": {**raw["text_cfg"], **text}})


def test_padding_is_cut_where_the_tower_allows_it_unless_told_otherwise() -> None:
    assert cuts_padding("auto", _model())
    assert cuts_padding("cut", _model())
    assert not cuts_padding("full", _model())


@pytest.mark.parametrize(
    ("text", "reason"), [({"no_causal_mask": True}, "no causal mask"), ({"pool_type": "last"}, "pools the last")]
)
def test_where_padding_counts_it_stays_and_the_log_says_why(
    text: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert not cuts_padding("auto", _model(**text))
    assert reason in caplog.text
    assert not cuts_padding("full", _model(**text))
    with pytest.raises(ConfigError, match=f"--text-padding cut: the text tower of tiny-test .*{reason}"):
        cuts_padding("cut", _model(**text))


# ---- what a rank reads of a checkpoint

TINY = TrainConfig(
    model=ModelSection(model="tiny-test", precision="fp32"),
    cluster=ClusterConfig(device="cpu", rendezvous_timeout_s=60),
)


def _checkpoint(folder: Path) -> Path:
    """Of a model after one step of its optimiser."""
    learner = build_learner(TINY, resolve_model(TINY), Fresh(""), None, World())
    for parameter in learner.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()
    with Checkpointer(folder, World()) as checkpointer:
        checkpointer.save(
            "epoch_1",
            progress=Done(1, 1, 8),
            model_state=learner.model.state_dict(),
            optimizer_state=optimizer_to_tensors(learner.optimizer, parameter_names(learner.model)),
            data_position={},
            config={},
            model_config=learner.model.config.to_dict(),
        )
    return folder / "epoch_1"


def _share_read(path: Path) -> float:
    """Of the file's bytes, those that this process has in its memory through a mapping of it."""
    kib, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = words[-1] == str(path)
        elif inside and words[0] == "Rss:":
            kib += int(words[1])
    return kib * 1024 / path.stat().st_size


def _bytes_by_read_calls() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _resume(folder: Path, fsdp: bool) -> tuple[float, float, float]:
    """Shares of the model's and the optimiser's file that a rank has read, and bytes that it read without a mapping."""
    config = replace(TINY, cluster=replace(TINY.cluster, fsdp=fsdp))
    start = Resume(folder, 1, "")
    with session(config.cluster) as world:
        before = _bytes_by_read_calls()
        loaded = load_start(start, world)
        build_learner(config, resolve_model(config), start, loaded, world)
        read = _bytes_by_read_calls() - before
        return _share_read(folder / "model.safetensors"), _share_read(folder / "optimizer.safetensors"), read


@pytest.mark.parametrize("fsdp", [False, True])
def test_weights_are_read_by_rank_0_alone_and_of_the_optimiser_s_state_only_a_rank_s_own_rows(
    fsdp: bool, tmp_path: Path
) -> None:
    folder = _checkpoint(tmp_path)
    main, other = run_ranks(_resume, 2, folder, fsdp, timeout_s=120)
    assert main[0] > 0.95 and other[0] < 0.2
    # A rank of DDP needs all of it; pages of the mapping are shared by the ranks of a node, and read once.
    assert all((0.4 < share < 0.7) if fsdp else share > 0.95 for _, share, _ in (main, other))
    # Python's own modules are read too; the checkpoint's 39 MiB are not.
    assert max(main[2], other[2]) < 20 * 2**20


def _with_drops(model: str = "tiny-test-timm", **section: float) -> TrainConfig:
    return TrainConfig(model=ModelSection(model=model, **section))  # type: ignore[arg-type]


def test_drops_reach_the_layers_of_the_trunk_and_of_the_head() -> None:
    config = resolve_model(_with_drops(force_drop_path=0.5, force_head_dropout=0.25))
    assert (config.vision_cfg.timm_drop_path, config.vision_cfg.timm_drop) == (0.5, 0.25)
    model = models.build_model(config)
    paths = [float(m.share) for m in model.visual.trunk.modules() if isinstance(m, RowDropPath)]
    heads = [m.share for m in model.visual.head.modules() if isinstance(m, RowDropout)]
    assert max(paths) == 0.5 and paths == sorted(paths)  # linear in the depth
    assert heads == [0.25]


def test_dropping_follows_the_rows_and_not_the_batch_they_are_in() -> None:
    torch.manual_seed(0)
    model = models.build_model(resolve_model(_with_drops(force_drop_path=0.5, force_head_dropout=0.5))).train()
    image, keys = torch.randn(6, 3, 64, 64), row_keys(7, 0, 6, torch.device("cpu"))
    model.row_draws.keys = keys
    whole = model.encode_image(image)
    model.row_draws.keys = keys[2:4]
    torch.testing.assert_close(model.encode_image(image[2:4]), whole[2:4], rtol=1e-4, atol=1e-5)
    model.row_draws.keys = keys + 1
    assert not torch.allclose(model.encode_image(image), whole, atol=1e-3)


def test_no_drops_are_no_layers_that_drop() -> None:
    model = models.build_model(resolve_model(_with_drops(force_drop_path=0.0, force_head_dropout=0.0)))
    assert not [m for m in model.modules() if isinstance(m, RowDropPath | RowDropout)]


@pytest.mark.parametrize(
    ("model", "drops", "message"),
    [
        ("tiny-test", {"force_drop_path": 0.1}, "stochastic depth 0.1: the image tower of tiny-test is no timm trunk"),
        ("tiny-test-rn", {"force_head_dropout": 0.1}, "head dropout 0.1: the image tower of tiny-test-rn is no timm"),
        ("tiny-test-timm", {"force_drop_path": 1.0}, r"stochastic depth must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_a_tower_cannot_drop_is_refused(model: str, drops: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(_with_drops(model, **drops))


@pytest.mark.parametrize("name", [name for name in models.list_models() if "SigLIP" in name])
def test_siglips_train_with_siglips_numbers(name: str) -> None:
    """Black is -1, white is 1, and training resizes with the filter that evaluation has."""
    config = TrainConfig(model=ModelSection(model=name), data=DataConfig(dataset_type="synthetic"))
    model = resolve_model(config)
    samples = Samples(data.open_catalog(None, None, "synthetic", 64), 64)
    settings = loader_config(config, samples, make_plan(config.optim, 64, 1), model)
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255.0)]).to(torch.uint8)
    black, white = build_transform(settings, model, World())(images, None)
    torch.testing.assert_close(black, torch.full((3, 4, 4), -1.0))
    torch.testing.assert_close(white, torch.full((3, 4, 4), 1.0))
    assert settings.interpolation == model.preprocess.interpolation
    assert model.preprocess.resize_mode == "squash"
