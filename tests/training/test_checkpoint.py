from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.training.conftest import FakeWorld
from training import checkpoint, checkpoint_files
from training.checkpoint import Checkpointer
from training.checkpoint_content import Progress, epoch_name, load_checkpoint, step_name, verify_weights
from training.checkpoint_files import find_latest, list_checkpoints, verify_checkpoint
from training.errors import EXIT_FAILED, CheckpointError, CheckpointWriteError
from training.host_copy import HostCopy
from training.optimizer_state import load_optimizer_tensors, optimizer_to_tensors


def content(step: int) -> dict[str, Any]:
    weight = torch.full((4, 3), float(step))
    return {
        "progress": Progress(step=step, epoch=step // 10, samples_seen=step * 64),
        "model_state": {"visual.proj": weight, "logit_scale": torch.tensor(4.6)},
        "optimizer_state": {"exp_avg/visual.proj": weight / 2, "step/visual.proj": torch.tensor(float(step))},
        "data_position": {"lanes": [[0, step, 1]]},
        "config": {"seed": 3, "lr": 5e-05, "aug_cfg": ("scale=(0.5, 1.0)",), "train_data": "https://u:p@h/a.tar"},
        "model_config": {"embed_dim": 3},
    }


def refuse(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- save and load


def test_what_was_saved_is_loaded(tmp_path: Path, world: FakeWorld) -> None:
    with Checkpointer(tmp_path, world) as checkpointer:
        checkpointer.save(step_name(42), **content(42), extra={"wandb_run_id": "abc"})
    loaded = load_checkpoint(tmp_path / "step_000000042")
    assert loaded.progress == Progress(step=42, epoch=4, samples_seen=2688)
    assert torch.equal(loaded.model["visual.proj"], torch.full((4, 3), 42.0))
    assert loaded.optimizer.keys() == {"exp_avg/visual.proj", "step/visual.proj"}
    assert loaded.data_position == {"lanes": [[0, 42, 1]]}
    assert loaded.config["lr"] == 5e-05 and loaded.config["aug_cfg"] == ["scale=(0.5, 1.0)"]
    assert loaded.model_config == {"embed_dim": 3}
    assert loaded.state["random"] == {"scheme": "step-keyed", "seed": 3}
    assert loaded.state["wandb_run_id"] == "abc" and loaded.state["world_size"] == 1
    assert loaded.state["versions"].keys() == {"clipyard", "torch", "python"}


def test_the_folder_holds_what_the_contract_names_and_no_secret(tmp_path: Path, world: FakeWorld) -> None:
    with Checkpointer(tmp_path, world) as checkpointer:
        checkpointer.save(epoch_name(1), **content(10))
    folder = tmp_path / "epoch_1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "data.json",
        "manifest.json",
        "model.safetensors",
        "model_config.json",
        "optimizer.safetensors",
        "state.json",
    ]
    assert load_file(folder / "model.safetensors").keys() == {"visual.proj", "logit_scale"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["train_data"] == "https://***@h/a.tar"
    assert verify_checkpoint(folder).files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_open_clip_loads_the_weights_file_as_it_is(tmp_path: Path, world: FakeWorld) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 4, "vocab_size": 20, "width": 8, "heads": 1, "layers": 1},
    }
    source, target = open_clip.CLIP(**config), open_clip.CLIP(**config)
    with Checkpointer(tmp_path, world) as checkpointer:
        checkpointer.save("epoch_1", **(content(1) | {"model_state": source.state_dict()}))
    open_clip.load_checkpoint(target, str(tmp_path / "epoch_1" / "model.safetensors"))
    assert all(torch.equal(tensor, target.state_dict()[key]) for key, tensor in source.state_dict().items())


def test_other_ranks_write_nothing_and_need_no_state(tmp_path: Path, second_rank: FakeWorld) -> None:
    with Checkpointer(tmp_path / "absent", second_rank) as checkpointer:
        checkpointer.reserve({}, {})
        checkpointer.save("epoch_1", **content(1))
        checkpointer.check()
    assert not (tmp_path / "absent").exists()


def test_old_step_checkpoints_go_and_epochs_stay(tmp_path: Path, world: FakeWorld) -> None:
    with Checkpointer(tmp_path, world, keep_last=2) as checkpointer:
        for step in range(1, 13):
            checkpointer.save(epoch_name(step // 4) if step % 4 == 0 else step_name(step), **content(step))
    kept = [folder.name for folder in list_checkpoints(tmp_path)]
    assert kept == ["epoch_3", "step_000000011", "step_000000010", "epoch_2", "epoch_1"]


def test_the_previous_epoch_goes_when_so_asked(tmp_path: Path, world: FakeWorld) -> None:
    with Checkpointer(tmp_path, world, delete_previous=True) as checkpointer:
        for epoch in (1, 2, 3):
            checkpointer.save(epoch_name(epoch), **content(10 * epoch))
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["epoch_3"]


def test_leftovers_of_a_killed_run_are_removed_at_the_start(tmp_path: Path, world: FakeWorld) -> None:
    leftover = tmp_path / f".tmp-epoch_1-{checkpoint_files.socket.gethostname()}-{2**22 + 1}"
    leftover.mkdir()
    Checkpointer(tmp_path, world).close()
    assert not leftover.exists()


# ---- the snapshot


def test_training_may_change_the_tensors_as_soon_as_save_returns(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    write = checkpoint.write_checkpoint

    def write_later(*arguments: Any, **options: Any) -> Any:
        assert go.wait(20)
        return write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write_later)
    saved = content(7)
    with Checkpointer(tmp_path, world) as checkpointer:
        checkpointer.save(step_name(7), **saved)
        saved["model_state"]["visual.proj"].zero_()
        saved["optimizer_state"]["exp_avg/visual.proj"].zero_()
        saved["data_position"]["lanes"].append("changed")
        saved["config"]["seed"] = 4
        go.set()
    loaded = load_checkpoint(tmp_path / step_name(7))
    assert float(loaded.model["visual.proj"].sum()) == 84 and float(loaded.optimizer["exp_avg/visual.proj"].sum()) == 42
    assert loaded.data_position == {"lanes": [[0, 7, 1]]} and loaded.config["seed"] == 3


def test_a_second_save_waits_for_the_first_write(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing: list[str] = []
    write = checkpoint.write_checkpoint

    def alone(folder: Path, *arguments: Any, **options: Any) -> Any:
        assert not writing
        writing.append(folder.name)
        manifest = write(folder, *arguments, **options)
        writing.clear()
        return manifest

    monkeypatch.setattr(checkpoint, "write_checkpoint", alone)
    with Checkpointer(tmp_path, world, keep_last=10) as checkpointer:
        for step in range(5):
            checkpointer.save(step_name(step), **content(step))
    for step in range(5):
        assert float(load_checkpoint(tmp_path / step_name(step)).model["visual.proj"][0, 0]) == step


def test_host_memory_is_taken_once(tmp_path: Path) -> None:
    host = HostCopy()
    files = {"a": {"x": torch.ones(5), "y": torch.ones(2, 3).to(torch.bfloat16)}}
    host.reserve(files)
    first = host.copy(files)
    files["a"]["x"].fill_(2)
    second = host.copy(files)
    assert all(first["a"][key].data_ptr() == second["a"][key].data_ptr() for key in "xy")
    assert second["a"]["x"].tolist() == [2.0] * 5
    grown = host.copy({"a": {"x": torch.ones(6)}})
    assert grown["a"]["x"].shape == (6,)


def test_reserving_changes_nothing_that_is_saved(tmp_path: Path, world: FakeWorld) -> None:
    saved = content(5)
    with Checkpointer(tmp_path, world) as checkpointer:
        checkpointer.reserve(saved["model_state"], saved["optimizer_state"])
        checkpointer.save(step_name(5), **saved)
    assert float(load_checkpoint(tmp_path / step_name(5)).model["visual.proj"][0, 0]) == 5


# ---- errors


def test_what_a_checkpoint_must_not_outlive_is_made_lasting_before_it_exists(tmp_path: Path, world: FakeWorld) -> None:
    seen: list[list[str]] = []

    def sync() -> None:
        assert threading.current_thread() is not threading.main_thread()
        seen.append([path.name for path in tmp_path.iterdir()])

    with Checkpointer(tmp_path, world, before_write=sync) as checkpointer:
        checkpointer.save(epoch_name(1), **content(10))
        checkpointer.wait()
        checkpointer.save(epoch_name(2), **content(20))
    assert seen == [[], ["epoch_1"]]


def test_it_is_told_how_long_a_save_took(tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    write = checkpoint.write_checkpoint

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slowly)
    with Checkpointer(tmp_path, world, on_saved=told.append) as checkpointer:
        checkpointer.save(epoch_name(1), **content(10))
    assert len(told) == 1 and told[0] >= 0.3


def test_a_failed_write_surfaces_at_the_next_occasion_and_stays(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path, world)
    checkpointer.save(step_name(1), **content(1))
    checkpointer.wait()
    monkeypatch.setattr(checkpoint_files.os, "fsync", refuse)
    checkpointer.save(step_name(2), **content(2))
    for occasion in (checkpointer.wait, checkpointer.check, checkpointer.close):
        with pytest.raises(CheckpointWriteError, match="step_000000002: No space left on device") as caught:
            occasion()
        assert caught.value.exit_code == EXIT_FAILED
    with pytest.raises(CheckpointWriteError):
        checkpointer.save(step_name(3), **content(3))
    assert [path.name for path in tmp_path.iterdir()] == [step_name(1)]
    assert find_latest(tmp_path)[0] == tmp_path / step_name(1)


def test_a_bug_in_the_writer_reaches_the_caller_too(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(checkpoint, "write_checkpoint", broken)
    checkpointer = Checkpointer(tmp_path, world)
    checkpointer.save(step_name(1), **content(1))
    with pytest.raises(CheckpointWriteError, match="cannot write checkpoint step_000000001: RuntimeError: boom"):
        checkpointer.close()


def test_the_error_that_ends_the_run_is_not_hidden_and_the_write_is_finished(tmp_path: Path, world: FakeWorld) -> None:
    checkpointer = Checkpointer(tmp_path, world)
    checkpointer.save(step_name(1), **content(1))
    with pytest.raises(ZeroDivisionError), checkpointer:
        raise ZeroDivisionError
    assert find_latest(tmp_path)[0] == tmp_path / step_name(1)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, world: FakeWorld) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match=r"cannot create .*file/checkpoints"):
        Checkpointer(tmp_path / "file" / "checkpoints", world)


def test_a_rotation_that_fails_only_warns(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "rotate", lambda *a, **k: refuse())
    with Checkpointer(tmp_path, world) as checkpointer:
        checkpointer.save(step_name(1), **content(1))
    assert "cannot delete old checkpoints" in caplog.text


@pytest.mark.parametrize("damage", ["state", "manifest", "size"])
def test_a_folder_that_cannot_be_loaded_is_a_checkpoint_error(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "epoch_1"
    documents = {"state.json": {}} if damage == "state" else {}
    checkpoint_files.write_checkpoint(folder, {}, documents, step=1, epoch=1)
    if damage == "manifest":
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="epoch_1"):
        load_checkpoint(folder)


def test_no_pickle_is_in_a_checkpoint(tmp_path: Path, world: FakeWorld) -> None:
    with Checkpointer(tmp_path, world) as checkpointer:
        checkpointer.save("epoch_1", **content(1))
    for path in (tmp_path / "epoch_1").iterdir():
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            yaml.safe_load(path.read_text())


# ---- a run, interrupted


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[Tensor]:
    losses = []
    for step in range(first, last):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[Tensor, str]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.2)
    return model, optimizer, {parameter: name for name, parameter in model.named_parameters()}


def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, world: FakeWorld) -> None:
    model, optimizer, _ = build(seed=0)
    expected = steps(model, optimizer, 0, 10)

    first, first_optimizer, first_names = build(seed=0)
    losses = steps(first, first_optimizer, 0, 4)
    with Checkpointer(tmp_path, world) as checkpointer:
        state = {
            "model_state": first.state_dict(),
            "optimizer_state": optimizer_to_tensors(first_optimizer, first_names),
        }
        checkpointer.save(step_name(4), **(content(4) | state))

    second, second_optimizer, second_names = build(seed=99)
    loaded = load_checkpoint(tmp_path / step_name(4))
    second.load_state_dict(loaded.model)
    load_optimizer_tensors(second_optimizer, second_names, loaded.optimizer)
    losses += steps(second, second_optimizer, 4, 10)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), model.parameters(), strict=True))


# ---- weights alone


@pytest.mark.parametrize("source", ["epoch_1", "epoch_1/model.safetensors"])
def test_weights_that_differ_from_their_manifest_are_named(tmp_path: Path, world: FakeWorld, source: str) -> None:
    with Checkpointer(tmp_path, world) as checkpointer:
        checkpointer.save(epoch_name(1), **content(10))
    verify_weights(str(tmp_path / source))
    (tmp_path / "epoch_1" / "optimizer.safetensors").unlink()  # another matter
    verify_weights(str(tmp_path / source))
    weights = bytearray((tmp_path / "epoch_1" / "model.safetensors").read_bytes())
    weights[-1] ^= 0x10
    (tmp_path / "epoch_1" / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"epoch_1: model\.safetensors is damaged"):
        verify_weights(str(tmp_path / source))


def test_weights_without_a_manifest_have_nothing_to_differ_from(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"anything")
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "none.pt", "s3://bucket/epoch_1"):
        verify_weights(str(source))
