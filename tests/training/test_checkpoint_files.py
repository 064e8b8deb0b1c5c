from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from training import checkpoint_files, rotation
from training.checkpoint_files import find_latest, list_checkpoints, verify_checkpoint, write_checkpoint
from training.errors import CheckpointError, CheckpointWriteError
from training.manifest import MANIFEST, FileEntry, Manifest
from training.rotation import clean_leftovers, rotate

REPOSITORY = Path(__file__).parents[2]
MODEL = "model.safetensors"
WriteStep = Callable[..., Path]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---- format


def test_the_file_is_read_by_safetensors_with_keys_types_and_values_as_given(tmp_path: Path) -> None:
    types = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ]
    tensors = {f"t{i}": torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype) for i, dtype in enumerate(types)}
    tensors |= {"scalar": torch.tensor(4.6), "empty": torch.empty(0, 3), "channels_last": torch.randn(2, 3, 4, 5)}
    tensors["channels_last"] = tensors["channels_last"].to(memory_format=torch.channels_last)
    write_checkpoint(tmp_path / "step_1", {MODEL: tensors}, {}, step=1, epoch=0)
    loaded = load_file(tmp_path / "step_1" / MODEL)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype and loaded[key].shape == tensor.shape
        assert torch.equal(loaded[key], tensor)


def test_the_header_names_the_format_as_other_programs_expect(write_step: WriteStep) -> None:
    with safe_open(write_step("step_1", 1) / MODEL, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@settings(max_examples=15, deadline=None)
@given(
    step=st.integers(0, 10**12),
    epoch=st.integers(0, 10**6),
    sizes=st.dictionaries(st.text(min_size=1, max_size=20), st.integers(0, 2**50), max_size=4),
)
def test_a_manifest_survives_being_written_and_read(step: int, epoch: int, sizes: dict[str, int]) -> None:
    files = {name: FileEntry(size, size % 2**32) for name, size in sizes.items()}
    manifest = Manifest(step=step, epoch=epoch, files=files, written_at=1.5)
    assert Manifest.from_text(manifest.to_text()) == manifest


# ---- verify


def test_a_whole_checkpoint_verifies_and_tells_its_step(write_step: WriteStep) -> None:
    manifest = verify_checkpoint(write_step("epoch_2", 70, epoch=2))
    assert (manifest.step, manifest.epoch) == (70, 2)
    assert manifest.files.keys() == {MODEL, "a.json"}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (flip_a_bit, MODEL, "model.safetensors is damaged"),
        (flip_a_bit, "a.json", "a.json is damaged"),
        (flip_a_bit, MANIFEST, "manifest.json is damaged"),
        (cut_short, MODEL, "model.safetensors has .* bytes, its manifest says"),
        (cut_short, MANIFEST, "manifest.json is damaged"),
        (Path.unlink, MODEL, "model.safetensors cannot be read"),
        (Path.unlink, MANIFEST, "has no manifest.json"),
    ],
)
def test_damage_is_named(write_step: WriteStep, damage: Callable[[Path], None], file: str, message: str) -> None:
    folder = write_step("step_5", 5)
    damage(folder / file)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(folder)


def test_a_manifest_edited_to_claim_another_step_is_refused(write_step: WriteStep) -> None:
    path = write_step("step_5", 5) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 6}))
    with pytest.raises(CheckpointError, match="its own checksum differs"):
        verify_checkpoint(path.parent)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"manifest_crc32": 1}', "\x00\x00"])
def test_a_manifest_of_garbage_is_a_checkpoint_error(write_step: WriteStep, text: str) -> None:
    path = write_step("step_5", 5) / MANIFEST
    path.write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        verify_checkpoint(path.parent)


# ---- find


def test_latest_is_the_newest_by_step_whatever_the_names_sort_like(tmp_path: Path, write_step: WriteStep) -> None:
    write_step("epoch_9", 90, epoch=9)
    write_step("epoch_10", 100, epoch=10)
    newest = write_step("step_000000105", 105, epoch=10)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_000000105", "epoch_10", "epoch_9"]
    assert find_latest(tmp_path) == (newest, [])


def test_at_the_same_step_the_epoch_is_preferred(tmp_path: Path, write_step: WriteStep) -> None:
    write_step("step_000000100", 100)
    assert find_latest(tmp_path)[0] != write_step("epoch_1", 100, epoch=1)
    assert find_latest(tmp_path)[0] == tmp_path / "epoch_1"


def test_damaged_checkpoints_are_passed_over_with_the_reason(tmp_path: Path, write_step: WriteStep) -> None:
    good = write_step("step_1", 1)
    flip_a_bit(write_step("step_2", 2) / MODEL)
    (write_step("step_3", 3) / MANIFEST).unlink()
    folder, passed_over = find_latest(tmp_path)
    assert folder == good
    assert [path.name for path, _ in passed_over] == ["step_3", "step_2"]
    assert "no manifest.json" in passed_over[0][1] and "damaged" in passed_over[1][1]


def test_other_names_are_no_checkpoints(tmp_path: Path, write_step: WriteStep) -> None:
    good = write_step("step_1", 1)
    for name in ("step_9.bak", "7", "epoch_latest", ".tmp-step_9-host-1", "step_-3"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "epoch_8").write_text("a file")
    assert list_checkpoints(tmp_path) == [good]


def test_an_absent_directory_holds_nothing(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "absent") == (None, [])
    assert clean_leftovers(tmp_path / "absent") == []


# ---- write


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path, write_step: WriteStep) -> None:
    write_step("step_4", 4)
    (tmp_path / "step_4" / "stranger").write_text("x")
    write_step("step_4", 4)
    assert names(tmp_path) == ["step_4"]
    assert not (tmp_path / "step_4" / "stranger").exists()


def test_a_full_disk_ends_with_a_clear_error_and_the_last_good_one(
    tmp_path: Path, write_step: WriteStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_step("step_1", 1)

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_files.os, "fsync", refuse)
    with pytest.raises(CheckpointWriteError, match=r"step_2: No space left on device \(.* GiB needed, .* free\)"):
        write_step("step_2", 2)
    assert names(tmp_path) == ["step_1"]
    assert find_latest(tmp_path) == (good, [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_write_that_fails_in_the_middle_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kw: real_open(Path("/dev/full"), *args, **kw))
    with pytest.raises(CheckpointWriteError, match="No space left"):
        write_checkpoint(tmp_path / "step_1", {}, {"a.txt": "text"}, step=1, epoch=0)
    assert names(tmp_path) == []


# ---- rotate


def test_rotation_keeps_epochs_and_the_newest_steps(tmp_path: Path, write_step: WriteStep) -> None:
    for step in (10, 20, 30, 40):
        write_step(f"step_{step:09d}", step)
    for epoch in (1, 2):
        write_step(f"epoch_{epoch}", epoch * 18, epoch=epoch)
    deleted = rotate(tmp_path, keep_last=2, delete_previous_epochs=False)
    assert [folder.name for folder in deleted] == ["step_000000020", "step_000000010"]
    assert names(tmp_path) == ["epoch_1", "epoch_2", "step_000000030", "step_000000040"]


def test_only_the_newest_epoch_stays_when_so_asked(tmp_path: Path, write_step: WriteStep) -> None:
    for epoch in (8, 9, 10):
        write_step(f"epoch_{epoch}", epoch * 18, epoch=epoch)
    rotate(tmp_path, keep_last=2, delete_previous_epochs=True)
    assert names(tmp_path) == ["epoch_10"]


def test_the_newest_and_the_one_just_written_stay_in_any_case(tmp_path: Path, write_step: WriteStep) -> None:
    for step in (10, 20, 30):
        write_step(f"step_{step:09d}", step)
    rotate(tmp_path, keep_last=0, delete_previous_epochs=True, keep=(tmp_path / "step_000000010",))
    assert names(tmp_path) == ["step_000000010", "step_000000030"]


def test_a_newer_one_without_manifest_neither_counts_nor_goes(tmp_path: Path, write_step: WriteStep) -> None:
    write_step("step_000000010", 10)
    (write_step("step_000000020", 20) / MANIFEST).unlink()
    rotate(tmp_path, keep_last=1, delete_previous_epochs=False)
    assert names(tmp_path) == ["step_000000010", "step_000000020"]


# ---- leftovers


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_leftovers_of_dead_writers_are_cleaned_and_a_nameless_checkpoint_gets_its_name_back(
    tmp_path: Path, write_step: WriteStep
) -> None:
    owner = f"{checkpoint_files.socket.gethostname()}-{dead_process()}"
    write_step("step_1", 1).rename(tmp_path / f".replaced-step_1-{owner}")
    write_step("step_2", 2)
    shutil.copytree(tmp_path / "step_2", tmp_path / f".replaced-step_2-{owner}")
    (tmp_path / f".tmp-step_3-{owner}").mkdir()
    (tmp_path / f".deleted-epoch_1-{owner}").mkdir()
    (tmp_path / ".tmp-step_4-another-host-17").mkdir()
    assert len(clean_leftovers(tmp_path)) == 5
    assert names(tmp_path) == ["step_1", "step_2"]


def test_a_process_that_is_younger_than_a_folder_is_not_its_writer(tmp_path: Path) -> None:
    leftover = tmp_path / f".replaced-step_3-{checkpoint_files.socket.gethostname()}-{os.getppid()}"
    leftover.mkdir()
    # As when the number of a killed writer has been given to another process since.
    began = rotation._began(os.getppid())
    assert 0 < began < time.time()
    os.utime(leftover, (began - 60, began - 60))
    assert clean_leftovers(tmp_path) == [leftover]
    assert (tmp_path / "step_3").is_dir()


def test_folders_of_a_living_writer_are_left_alone(tmp_path: Path) -> None:
    leftover = tmp_path / f".tmp-step_3-{checkpoint_files.socket.gethostname()}-{os.getppid()}"
    leftover.mkdir()
    assert clean_leftovers(tmp_path) == []
    assert leftover.exists()


# ---- kills

PREAMBLE = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from training.checkpoint_files import find_latest, verify_checkpoint, write_checkpoint
from training.rotation import clean_leftovers, rotate

directory = Path(sys.argv[1])

def save(name, step, size=20_000):
    tensors = {"m.safetensors": {"a": torch.full((size,), float(step)), "b": torch.tensor(step)}}
    write_checkpoint(directory / name, tensors, {"a.json": {"step": step}}, step=step, epoch=0)
    rotate(directory, keep_last=2, delete_previous_epochs=True)

def newest_step():
    clean_leftovers(directory)
    folder, passed_over = find_latest(directory)
    assert not passed_over, passed_over
    if folder is None:
        return 0
    step = verify_checkpoint(folder).step
    content = load_file(folder / "m.safetensors")
    assert int(content["b"]) == step and bool((content["a"] == step).all()), (folder, content)
    return step
"""

RANDOM_KILLS = (
    PREAMBLE
    + """
def run_until_killed():
    step = newest_step()
    while True:
        step += 1
        save(f"epoch_{step}" if step % 3 == 0 else f"step_{step:09d}", step)

random.seed(0)
seen = [0]
for _ in range(20):
    child = os.fork()
    if child == 0:
        run_until_killed()
    time.sleep(random.uniform(0.005, 0.09))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.append(newest_step())
assert seen == sorted(seen), seen
assert seen[-1] > 3, seen
assert len(list(directory.iterdir())) <= 6, list(directory.iterdir())
"""
)

# Every call that touches a name or opens a file is an audit event: the child dies at the n-th of them.
KILL_AT_EVERY_CALL = (
    PREAMBLE
    + """
os.fsync = lambda descriptor: None  # costs time and decides nothing where only the process dies
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.rmtree"}

def die_at(n):
    left = [n]
    def hook(event, arguments):
        if event in EVENTS:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
    sys.addaudithook(hook)

save("step_000000001", 1)
save("step_000000002", 2)
save("epoch_1", 3)
died = 0
for n in range(1, 1000, int(sys.argv[2])):
    before = newest_step()
    child = os.fork()
    if child == 0:
        die_at(n)
        save("step_000000004", 4)   # new, with rotation of step_000000001
        save("step_000000004", 4)   # in place of one that is whole
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    died += 1
    assert newest_step() >= before, (n, before)
assert newest_step() == 4
assert died * int(sys.argv[2]) > 30, died
assert not [path for path in directory.iterdir() if path.name.startswith(".")]
"""
)


def run_script(script: str, *arguments: str) -> None:
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.alone
def test_a_writer_killed_at_a_random_moment_leaves_a_whole_checkpoint_and_no_older_one(tmp_path: Path) -> None:
    run_script(RANDOM_KILLS, str(tmp_path))


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_file_call_leaves_a_whole_checkpoint_and_no_older_one(
    tmp_path: Path, stride: int
) -> None:
    run_script(KILL_AT_EVERY_CALL, str(tmp_path), str(stride))
