from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from tests.training.conftest import FakeWorld
from training.checkpoint_files import verify_checkpoint, write_checkpoint
from training.errors import CheckpointError, ConfigError, RemoteError
from training.manifest import MANIFEST, read_manifest_text
from training.remote import Remote, open_remote
from training.start import Fresh, Pretrained, Resume, StartState, choose_start, decide_start


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one epoch and a step beyond it."""
    run_dir = tmp_path / "run"
    for name, step in (("epoch_1", 10), ("step_000000015", 15)):
        write_checkpoint(run_dir / "checkpoints" / name, {}, {"a.json": [step]}, step=step, epoch=1, samples_seen=step)
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


# ---- with a remote


@pytest.fixture
def away(run_dir: Path, tmp_path: Path) -> Remote:
    """The remote of the run, with all that the run has, its numbers, and a step beyond."""
    remote = open_remote(f"{tmp_path}/away", "run", run_dir)
    write_checkpoint(tmp_path / "elsewhere/step_000000030", {}, {"a.json": [30]}, step=30, epoch=2, samples_seen=30)
    for folder in [*(run_dir / "checkpoints").iterdir(), tmp_path / "elsewhere/step_000000030"]:
        remote.upload(folder, read_manifest_text(folder) or "")
    remote.write("metrics.jsonl", b'{"step": 30}\n')
    return remote


def latest(run_dir: Path, away: Remote, **options: str | None) -> StartState:
    arguments = {"resume": "latest", "pretrained": None} | options
    return choose_start(run_dir, opener=lambda: away, **arguments)  # type: ignore[arg-type]


def silent() -> Remote:
    raise RemoteError("s3://bucket does not answer")


def test_a_newer_checkpoint_at_the_remote_is_fetched_with_the_numbers_up_to_it(run_dir: Path, away: Remote) -> None:
    start = latest(run_dir, away)
    assert isinstance(start, Resume)
    assert (start.folder, start.step) == (run_dir / "checkpoints/step_000000030", 30)
    assert verify_checkpoint(start.folder).samples_seen == 30
    assert f"fetched from {away}/checkpoints/step_000000030" in start.reason and "passed over" not in start.reason
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 30}\n'


def test_evaluations_are_fetched_too_unless_the_folder_has_its_own(run_dir: Path, away: Remote) -> None:
    away.write("evaluations.jsonl", b'{"step": 10}\n')
    latest(run_dir, away)
    assert (run_dir / "evaluations.jsonl").read_text() == '{"step": 10}\n'
    (run_dir / "evaluations.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    shutil.rmtree(run_dir / "checkpoints/step_000000030")
    assert "fetched" in latest(run_dir, away).reason
    assert (run_dir / "evaluations.jsonl").read_text() == '{"step": 10}\n{"step": 20}\n'


def test_of_equal_ones_the_local_checkpoint_is_taken_as_it_is(run_dir: Path, away: Remote) -> None:
    away.discard("step_000000030")
    (run_dir / "metrics.jsonl").write_text('{"step": 15}\n')
    start = latest(run_dir, away)
    assert isinstance(start, Resume) and start.step == 15 and "fetched" not in start.reason
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 15}\n'


def test_a_damaged_local_checkpoint_is_replaced_by_the_whole_one_at_the_remote(run_dir: Path, away: Remote) -> None:
    away.discard("step_000000030")
    damage(run_dir / "checkpoints/step_000000015")
    start = latest(run_dir, away)
    assert isinstance(start, Resume) and start.step == 15
    assert "passed over: " in start.reason and "a.json has 2 bytes" in start.reason and "fetched from" in start.reason
    assert verify_checkpoint(start.folder).step == 15


def test_a_damaged_checkpoint_at_the_remote_is_passed_over_with_its_reason(
    run_dir: Path, away: Remote, tmp_path: Path
) -> None:
    damage(tmp_path / "away/run/checkpoints/step_000000030")
    start = latest(run_dir, away)
    assert isinstance(start, Resume) and start.step == 15
    assert f"passed over: {away}/checkpoints/step_000000030: a.json has 2 bytes" in start.reason
    assert not (run_dir / "checkpoints/step_000000030").exists()


def test_half_an_upload_is_passed_over_and_said_to_be_one(run_dir: Path, away: Remote, tmp_path: Path) -> None:
    (tmp_path / "away/run/checkpoints/step_000000030" / MANIFEST).unlink()
    start = latest(run_dir, away)
    assert isinstance(start, Resume) and start.step == 15
    assert (
        "passed over: step_000000030 at " in start.reason and "is not whole (it has no manifest.json)" in start.reason
    )


def test_a_run_whose_folder_is_gone_goes_on_from_the_remote(run_dir: Path, away: Remote) -> None:
    shutil.rmtree(run_dir)
    start = latest(run_dir, away)
    assert isinstance(start, Resume) and start.step == 30
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000000030"]


def test_a_run_of_which_only_half_an_upload_exists_begins_anew(tmp_path: Path) -> None:
    away = open_remote(f"{tmp_path}/away", "run", tmp_path / "run")
    (tmp_path / "away/run/checkpoints/step_000000005").mkdir(parents=True)
    start = latest(tmp_path / "run", away)
    assert isinstance(start, Fresh) and f"or at {away} yet" in start.reason


def test_a_run_whose_only_checkpoints_are_damaged_ones_at_the_remote_is_not_begun_anew(
    run_dir: Path, away: Remote, tmp_path: Path
) -> None:
    shutil.rmtree(run_dir)
    for name in ("epoch_1", "step_000000015", "step_000000030"):
        damage(tmp_path / "away/run/checkpoints" / name)
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* or at .*away/run is whole"):
        latest(run_dir, away, pretrained="w.pt")


def test_where_the_remote_does_not_answer_the_newest_local_checkpoint_is_taken_and_that_is_said(run_dir: Path) -> None:
    start = choose_start(run_dir, resume="latest", pretrained=None, opener=silent)
    assert isinstance(start, Resume) and start.step == 15
    assert "there may be a newer one: s3://bucket does not answer" in start.reason


@pytest.mark.parametrize("resume", ["latest", None])
def test_a_run_is_not_begun_anew_while_nobody_says_whether_it_is_at_the_remote(
    tmp_path: Path, resume: str | None
) -> None:
    with pytest.raises(RemoteError, match="does not answer") as caught:
        choose_start(tmp_path / "run", resume=resume, pretrained=None, opener=silent)
    assert caught.value.exit_code == 1


def test_a_fetch_that_breaks_off_goes_on_from_the_next_or_ends_so_that_another_try_may_help(
    run_dir: Path, away: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, directory: Path) -> Path:
        raise RemoteError(f"{name}: connection reset")

    monkeypatch.setattr(away, "fetch", broken)
    start = latest(run_dir, away)
    assert isinstance(start, Resume) and start.step == 15 and "step_000000030: connection reset" in start.reason
    shutil.rmtree(run_dir)
    with pytest.raises(RemoteError, match="connection reset"):
        latest(run_dir, away)


def test_a_run_that_exists_at_the_remote_only_is_refused_without_resume(run_dir: Path, away: Remote) -> None:
    shutil.rmtree(run_dir)
    with pytest.raises(ConfigError, match=r"the run .*away/run exists already; add --resume latest"):
        latest(run_dir, away, resume=None)


def test_a_checkpoint_is_resumed_by_its_url_and_then_belongs_to_the_run(away: Remote, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away/run/checkpoints/epoch_1"
    other = tmp_path / "other"
    for _ in range(2):  # the second time it is here
        start = choose_start(other, resume=url, pretrained=None)
        assert isinstance(start, Resume)
        assert (start.folder, start.step) == (other / "checkpoints/epoch_1", 10)
        assert f"fetched from {url}, as --resume says" in start.reason
    assert not (other / "metrics.jsonl").exists()
    write_checkpoint(other / "checkpoints/epoch_1", {}, {"a.json": [11]}, step=11, epoch=1)
    with pytest.raises(CheckpointError, match="is another checkpoint of that name"):
        choose_start(other, resume=url, pretrained=None)
    with pytest.raises(CheckpointError, match="has no manifest"):
        choose_start(other, resume=url.replace("epoch_1", "epoch_9"), pretrained=None)


def test_a_checkpoint_of_the_run_that_is_at_the_remote_only_is_resumed_by_its_name(run_dir: Path, away: Remote) -> None:
    start = latest(run_dir, away, resume="step_000000030")
    assert isinstance(start, Resume) and start.step == 30 and f"fetched from {away}" in start.reason
    assert (run_dir / "metrics.jsonl").exists()
