from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from tests.training.conftest import FakeWorld
from training.checkpoint_files import MANIFEST, write_checkpoint
from training.errors import CheckpointError, ConfigError
from training.start import Fresh, Pretrained, Resume, choose_start, decide_start


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one epoch and a step beyond it."""
    run_dir = tmp_path / "run"
    for name, step in (("epoch_1", 10), ("step_000000015", 15)):
        write_checkpoint(run_dir / "checkpoints" / name, {}, {"a.json": [step]}, step=step, epoch=1)
    return run_dir


def damage(folder: Path) -> None:
    (folder / "a.json").write_text("{}")


def test_a_new_run_starts_from_initial_or_pretrained_weights(tmp_path: Path) -> None:
    assert isinstance(choose_start(tmp_path / "new", resume=None, pretrained=None), Fresh)
    start = choose_start(tmp_path / "new", resume=None, pretrained="s3://b/epoch_1.pt")
    assert isinstance(start, Pretrained) and start.source == "s3://b/epoch_1.pt" and start.source in start.reason


def test_resume_latest_of_a_run_that_does_not_exist_begins_it(tmp_path: Path) -> None:
    assert isinstance(choose_start(tmp_path, resume="latest", pretrained=None), Fresh)
    start = choose_start(tmp_path, resume="latest", pretrained="w.pt")
    assert isinstance(start, Pretrained) and "no checkpoint in" in start.reason


def test_a_found_checkpoint_wins_over_the_pretrained_file(run_dir: Path) -> None:
    start = choose_start(run_dir, resume="latest", pretrained="/does/not/exist.pt")
    assert isinstance(start, Resume)
    assert (start.folder, start.step, start.passed_over) == (run_dir / "checkpoints/step_000000015", 15, ())


def test_resume_latest_says_what_it_passed_over(run_dir: Path) -> None:
    damage(run_dir / "checkpoints/step_000000015")
    start = choose_start(run_dir, resume="latest", pretrained=None)
    assert isinstance(start, Resume) and start.step == 10
    assert [place.rpartition("/")[2] for place, _ in start.passed_over] == ["step_000000015"]
    assert "passed over: " in start.reason and "a.json has 2 bytes" in start.reason


def test_a_run_whose_checkpoints_are_all_damaged_is_not_silently_begun_anew(run_dir: Path) -> None:
    for name in ("epoch_1", "step_000000015"):
        damage(run_dir / "checkpoints" / name)
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is whole"):
        choose_start(run_dir, resume="latest", pretrained="w.pt")


def test_leftovers_do_not_count_as_a_run_and_do_not_stop_it(run_dir: Path) -> None:
    for name in ("epoch_1", "step_000000015"):
        shutil.rmtree(run_dir / "checkpoints" / name)
    (run_dir / "checkpoints" / ".tmp-epoch_1-elsewhere-1").mkdir()
    assert isinstance(choose_start(run_dir, resume=None, pretrained=None), Fresh)
    assert isinstance(choose_start(run_dir, resume="latest", pretrained=None), Fresh)


def test_an_existing_run_without_resume_is_refused_with_both_ways_out(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"run exists already; add --resume latest .* another --name"):
        choose_start(run_dir, resume=None, pretrained=None)


def test_a_run_that_has_only_metrics_exists_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="exists already"):
        choose_start(tmp_path, resume=None, pretrained=None)


def test_a_run_that_failed_before_its_first_step_may_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "metrics.jsonl").write_text("")
    assert isinstance(choose_start(tmp_path, resume=None, pretrained=None), Fresh)


def test_a_folder_is_resumed_by_path_or_by_its_name_in_the_run(run_dir: Path, tmp_path: Path) -> None:
    folder = run_dir / "checkpoints" / "epoch_1"
    for resume in (str(folder), "epoch_1"):
        start = choose_start(run_dir, resume=resume, pretrained=None)
        assert isinstance(start, Resume) and start.folder == folder and start.step == 10
    assert isinstance(choose_start(tmp_path / "other", resume=str(folder), pretrained=None), Resume)


def test_a_named_folder_must_verify(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "epoch_1"
    damage(folder)
    with pytest.raises(CheckpointError, match=r"a\.json has 2 bytes"):
        choose_start(run_dir, resume=str(folder), pretrained=None)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        choose_start(run_dir, resume=str(folder), pretrained=None)
    with pytest.raises(CheckpointError, match="absent is not a checkpoint folder"):
        choose_start(run_dir, resume=str(run_dir / "absent"), pretrained=None)


def test_a_file_given_to_resume_is_referred_to_pretrained(tmp_path: Path) -> None:
    (tmp_path / "epoch_1.pt").write_text("")
    with pytest.raises(CheckpointError, match="use --pretrained"):
        choose_start(tmp_path / "run", resume=str(tmp_path / "epoch_1.pt"), pretrained=None)


def test_the_decision_is_shared_between_ranks(run_dir: Path, world: FakeWorld) -> None:
    start = decide_start(world, run_dir, resume="latest", pretrained=None)
    assert pickle.loads(pickle.dumps(start)) == start
