"""Means of models: exact, from any mixture of files, in the memory of a few tensors, and refused in time."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import CLIP, CheckpointError, ConfigError, ModelConfig, config_with, load_model_config
from models.averaging import Average, Member, common_config
from tests.helpers.process import ROOT, environment

Build = Callable[[str | ModelConfig], CLIP]


@pytest.fixture
def states(build: Build) -> list[dict[str, Tensor]]:
    """Weights of three models of one kind, batch norms among them."""
    generator = torch.Generator().manual_seed(1)
    template = build("tiny-test-rn").state_dict()
    return [
        {
            key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + number
            for key, value in template.items()
        }
        for number in range(3)
    ]


def _saved(folder: Path, states: list[dict[str, Tensor]]) -> list[Member]:
    paths = [folder / f"{number}.safetensors" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    return [Member(str(path)) for path in paths]


def _mean(name: str, members: list[Member], path: Path, **options: int) -> dict[str, Tensor]:
    Average(load_model_config(name), members, **options).write(path)
    return load_file(path)


def _exact(values: list[float], weights: list[float]) -> float:
    """The weighted mean in rational arithmetic, rounded once to fp32."""
    total = sum(Fraction(weight) * Fraction(value) for weight, value in zip(weights, values, strict=True))
    return torch.tensor(float(total / sum(map(Fraction, weights))), dtype=torch.float64).float().item()


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.25, 3.0]])
def test_each_element_is_the_rational_mean_rounded_once(
    states: list[dict[str, Tensor]], tmp_path: Path, weights: list[float]
) -> None:
    members = [replace(m, weight=w) for m, w in zip(_saved(tmp_path, states), weights, strict=True)]
    mean = _mean("tiny-test-rn", members, tmp_path / "mean.safetensors")
    assert mean.keys() == states[0].keys()
    for key in ("visual.conv1.weight", "visual.bn1.running_var", "text_projection"):
        columns = zip(*(state[key].flatten()[:200].tolist() for state in states), strict=True)
        assert mean[key].flatten()[:200].tolist() == [_exact(list(values), weights) for values in columns]


def test_the_mean_of_copies_is_the_copy_bit_for_bit(states: list[dict[str, Tensor]], tmp_path: Path) -> None:
    mean = _mean("tiny-test-rn", _saved(tmp_path, [states[0]] * 3), tmp_path / "mean.safetensors")
    assert all(torch.equal(mean[key], value) for key, value in states[0].items())


@pytest.mark.parametrize("piece_elements", [50_000, 999_983])
def test_how_tensors_are_cut_changes_no_bit(build: Build, tmp_path: Path, piece_elements: int) -> None:
    state = build("tiny-test").state_dict()
    assert max(value.numel() for value in state.values()) > 3 * piece_elements
    members = _saved(tmp_path, [state, {key: value * 1.1 for key, value in state.items()}])
    whole = _mean("tiny-test", members, tmp_path / "whole.safetensors")
    cut = _mean("tiny-test", members, tmp_path / "cut.safetensors", piece_elements=piece_elements)
    assert all(torch.equal(cut[key], value) for key, value in whole.items())


def test_temperatures_are_averaged_as_logarithms_and_whole_numbers_are_the_firsts(
    states: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    for state, scale in zip(states, (10.0, 20.0, 80.0), strict=True):
        state["logit_scale"] = torch.tensor(scale).log()
    members = _saved(tmp_path, states)
    mean = _mean("tiny-test-rn", members[1:] + members[:1], tmp_path / "mean.safetensors")
    assert mean["logit_scale"].exp().item() == pytest.approx((10 * 20 * 80) ** (1 / 3))
    assert mean["visual.bn1.num_batches_tracked"].item() == 1
    assert Average(load_model_config("tiny-test-rn"), members).has_running_statistics
    assert mean["visual.bn1.num_batches_tracked"].dtype == torch.int64


def test_files_of_all_kinds_mix(states: list[dict[str, Tensor]], tmp_path: Path) -> None:
    (tmp_path / "epoch_1").mkdir()
    save_file(states[0], tmp_path / "epoch_1" / "model.safetensors")
    trainer = {f"module.{key}": value for key, value in states[1].items()}
    trainer["module.logit_scale"] = trainer["module.logit_scale"].reshape(1)
    torch.save({"epoch": 2, "state_dict": trainer}, tmp_path / "epoch_2.pt")
    torch.save(states[2], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with fsspec.open("memory://soups/remote.pt", "wb") as remote:
        torch.save(states[0], remote)
    mixed = [str(tmp_path / name) for name in ("epoch_1", "epoch_2.pt", "old.pt")] + ["memory://soups/remote.pt"]
    found = _mean("tiny-test-rn", [Member(source) for source in mixed], tmp_path / "mixed.safetensors")
    expected = _mean("tiny-test-rn", _saved(tmp_path, [*states, states[0]]), tmp_path / "alike.safetensors")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float16),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
    ],
)
def test_the_result_is_as_wide_as_its_widest_member(
    build: Build, tmp_path: Path, dtypes: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    state = build("tiny-test").state_dict()
    members = _saved(tmp_path, [{key: value.to(dtype) for key, value in state.items()} for dtype in dtypes])
    mean = _mean("tiny-test", members, tmp_path / "mean.safetensors")
    assert {value.dtype for value in mean.values()} == {expected}


def test_a_mean_in_a_model_is_the_mean_in_the_file(
    build: Build, states: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    members, model = _saved(tmp_path, states), build("tiny-test-rn")
    Average(model.config, members).load_into(model)
    written = _mean("tiny-test-rn", members, tmp_path / "mean.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in written.items())


def test_every_tensor_of_the_file_lies_on_a_multiple_of_its_item_size(build: Build, tmp_path: Path) -> None:
    state = {key: value.half() if "bias" in key else value for key, value in build("tiny-test-rn").state_dict().items()}
    _mean("tiny-test-rn", _saved(tmp_path, [state]), path := tmp_path / "mean.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = {key: entry for key, entry in json.loads(raw[8 : 8 + size]).items() if key != "__metadata__"}
    widths = {"F32": 4, "F16": 2, "I64": 8}
    assert {entry["dtype"] for entry in header.values()} == widths.keys()
    assert all((8 + size + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0 for entry in header.values())


_AVERAGE_OF_FIVE = """
import os, sys, torch
from pathlib import Path
from models import build_model, load_model_config
from models.averaging import Average, Member
from models.weight_writer import TensorSpec, write_safetensors

def peak_mib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

folder, config = Path(sys.argv[1]), load_model_config("ViT-S-32-alt")
with torch.device("meta"):
    state = build_model(config).state_dict()
specs = {key: TensorSpec(value.dtype, tuple(value.shape)) for key, value in state.items()}
write_safetensors(folder / "0", specs, (torch.ones(spec.shape) for spec in specs.values()))
for number in range(1, 5):
    os.link(folder / "0", folder / str(number))
before = peak_mib()
Average(config, [Member(str(folder / str(number))) for number in range(5)], 2**20).write(folder / "mean")
print(peak_mib() - before)
"""


@pytest.mark.slow
def test_five_models_are_averaged_in_less_memory_than_one_takes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _AVERAGE_OF_FIVE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=True)
    assert filecmp.cmp(tmp_path / "mean", tmp_path / "0", shallow=False)
    one_model_mib = (tmp_path / "0").stat().st_size / 2**20
    assert float(done.stdout) < one_model_mib / 2


def test_another_architecture_is_refused_by_name_before_anything_is_read(
    build: Build, states: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    members = _saved(tmp_path, states)
    save_file(build("tiny-test").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=r"vit\.safetensors does not fit model tiny-test-rn.*it fits tiny-test$"):
        Average(load_model_config("tiny-test-rn"), [*members, Member(str(tmp_path / "vit.safetensors"))])


def test_other_positions_are_refused_and_not_resized(build: Build, tmp_path: Path) -> None:
    config = load_model_config("tiny-test")
    members = _saved(tmp_path, [build(config).state_dict(), build(config_with(config, image_size=64)).state_dict()])
    with pytest.raises(CheckpointError, match=r"1\.safetensors.*1 of another shape: visual\.positional_embedding"):
        Average(config, members)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(states: list[dict[str, Tensor]], tmp_path: Path, value: float) -> None:
    states[1]["ln_final.weight"][3] = value
    average = Average(load_model_config("tiny-test-rn"), _saved(tmp_path, states))
    with pytest.raises(CheckpointError, match=r"1\.safetensors: ln_final\.weight has values that are not finite"):
        average.write(tmp_path / "mean.safetensors")


def test_configurations_may_differ_in_size_and_in_what_acts_in_training_only() -> None:
    small = load_model_config("convnext_large_d")
    large = replace(config_with(small, image_size=320, init_logit_scale=4.0), name="other")
    large = replace(large, vision_cfg=replace(large.vision_cfg, timm_drop_path=0.0))
    config, notes = common_config({"a": large, "b": small, "c": large})
    assert config is large
    assert notes == ["image size 256 of b gives way to 320 of a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quick_gelu": True}, "a and b are different models: quick_gelu is False and True"),
        ({"image_mean": (0.5, 0.5, 0.5)}, "preprocess_cfg.mean is "),
        ({"init_logit_bias": -10.0}, "logit_bias is False and True"),
    ],
)
def test_what_equal_shapes_hide_is_refused(change: dict, message: str) -> None:
    config = load_model_config("tiny-test")
    with pytest.raises(ConfigError) as caught:
        common_config({"a": config, "b": config_with(config, **change)})
    assert message in str(caught.value)
