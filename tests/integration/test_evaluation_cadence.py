"""Whole runs that evaluate between the ends of epochs: when, how often, and what a disturbance inside one costs."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.course import GLOBAL_BATCH, STEPS_AN_EPOCH, Attempt, Course, assert_same_run, run_whole, write_data
from tests.helpers.kill_points import arm
from tests.helpers.nursery import Nursery
from tests.helpers.poison import poisoned_run
from training.evaluation import Evaluator, classifier_cache, tasks
from training.main import main
from training.preemption import Preemption

OFTEN = (
    *("--zeroshot-every-n-steps", "4", "--val-every-n-samples", str(3 * GLOBAL_BATCH), "--evaluate-first"),
    *("--zeroshot-frequency", "0"),
)
COURSE = Course("often", epochs=2, flags=OFTEN)  # of 12 steps
ZEROSHOT, VAL = "val/shapes-zeroshot-top1", "val/clip_val_loss"
# Of OFTEN: pictures every 4 steps, pairs every 3 steps and at the ends of epochs.
DUE = {0: {ZEROSHOT, VAL}, 3: {VAL}, 4: {ZEROSHOT}, 6: {VAL}, 8: {ZEROSHOT}, 9: {VAL}, 12: {ZEROSHOT, VAL}}


@pytest.fixture(scope="module")
def course_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cadence")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(course_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """An undisturbed run, in this process."""
    attempt = Attempt(COURSE, course_data, tmp_path_factory.mktemp("whole"))
    assert main([*attempt.argv()]) == 0
    return attempt


@pytest.fixture
def attempt(course_data: Path, tmp_path: Path) -> Attempt:
    return Attempt(COURSE, course_data, tmp_path)


def records(attempt: Attempt) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (attempt.run_dir / "metrics.jsonl").read_text().splitlines()]


def evaluations(attempt: Attempt) -> list[tuple[int, set[str]]]:
    """The step of each evaluation and which sets it was of, in the order of the file."""
    found = [(record["step"], {ZEROSHOT, VAL} & record.keys()) for record in records(attempt)]
    return [(step, names) for step, names in found if names]


def assert_as(attempt: Attempt, whole: Attempt) -> None:
    assert_same_run(replace_samples(attempt), replace_samples(whole))


def replace_samples(attempt: Attempt) -> Attempt:
    """In this process nobody noted which samples were consumed."""
    for rank in range(attempt.course.world_size):
        attempt.samples_file(rank).touch()
    return attempt


def stopped_in_evaluation(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], None]:
    """A signal comes while evaluation `number`, from 1, is running. Returns what takes it back."""
    asked, calls, plain = [False], iter(range(1, 1000)), Evaluator.evaluate_sets

    def evaluate_sets(self: Evaluator, *args: Any) -> Any:
        asked[0] = asked[0] or next(calls) == number
        return plain(self, *args)

    monkeypatch.setattr(Evaluator, "evaluate_sets", evaluate_sets)
    monkeypatch.setattr(Preemption, "requested", lambda self: "signal SIGTERM" if asked[0] else None)
    return monkeypatch.undo


def test_each_evaluation_that_is_due_is_recorded_once_and_the_first_before_any_step(whole: Attempt) -> None:
    assert evaluations(whole) == list(DUE.items())
    first = records(whole)[0]
    assert (first["step"], first["epoch"], first["samples_seen"]) == (0, 0, 0)
    log = (whole.run_dir / "train.log").read_text()
    assert "evaluation: before the first step, then zero-shot every 4 steps, --val-data every epoch and every 24" in log
    assert log.count("evaluated: ") == len(DUE)


def test_evaluations_leave_the_training_as_it_is_without_them(
    course_data: Path, whole: Attempt, tmp_path: Path
) -> None:
    flags = ("--zeroshot-frequency", "0", "--val-frequency", "0")
    plain = Attempt(replace(COURSE, flags=flags), course_data, tmp_path)
    assert main([*plain.argv()]) == 0
    assert evaluations(plain) == []
    losses = [[r["train/loss"] for r in records(each) if "train/loss" in r] for each in (plain, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == COURSE.num_steps
    files = [(each.checkpoints / "epoch_2" / "model.safetensors").read_bytes() for each in (plain, whole)]
    assert files[0] == files[1]


# The evaluations of DUE by number: in mid-epoch, at the end of an epoch, at the end of the run.
@pytest.mark.parametrize(("number", "step"), [(2, 3), (3, 4), (4, 6), (7, 12)])
def test_a_stop_inside_an_evaluation_is_saved_and_made_up_for(
    whole: Attempt, attempt: Attempt, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    undo = stopped_in_evaluation(monkeypatch, number)
    assert main([*attempt.argv()]) == 75
    undo()
    assert attempt.newest() == step
    assert [at for at, _ in evaluations(attempt)] == [at for at in DUE if at < step]
    assert main([*attempt.argv()]) == 0
    assert_as(attempt, whole)


def test_a_stop_inside_the_evaluation_before_the_first_step_begins_anew(
    whole: Attempt, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = stopped_in_evaluation(monkeypatch, 1)
    assert main([*attempt.argv()]) == 75
    undo()
    assert attempt.newest() == -1
    assert main([*attempt.argv()]) == 0
    assert_as(attempt, whole)


@pytest.mark.parametrize("step", [4, 5])
def test_a_run_that_is_told_to_stop_has_evaluated_what_was_due_and_does_not_do_it_again(
    whole: Attempt, attempt: Attempt, step: int
) -> None:
    assert main([*attempt.argv(), "--stop-after-steps", str(step)]) == 75
    assert evaluations(attempt) == [(at, names) for at, names in DUE.items() if at <= step]
    assert main([*attempt.argv()]) == 0
    assert_as(attempt, whole)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_another_global_batch_goes_on_with_the_multiples_of_samples_that_are_left(
    course_data: Path, tmp_path: Path, batch_size: int
) -> None:
    flags = ("--zeroshot-frequency", "0", "--val-frequency", "0", "--val-every-n-samples", "24", "--evaluate-first")
    attempt = Attempt(Course("elastic", epochs=2, flags=flags), course_data, tmp_path)
    assert main([*attempt.argv(), "--stop-after-steps", "6"]) == 75
    assert main([*attempt.argv(), "--batch-size", str(batch_size)]) == 0
    found = [record["samples_seen"] for record in records(attempt) if VAL in record]
    # Of 16 samples a step, the first that has seen 72 has seen 80; what ends at 48 was evaluated before.
    kept = {4: [0, 24, 48, 72, 96], 16: [0, 24, 48, 80, 96]}[batch_size]
    assert found == kept


def test_a_resume_at_a_batch_so_large_that_it_has_made_no_step_yet_is_no_first_start(
    course_data: Path, tmp_path: Path
) -> None:
    flags = ("--zeroshot-frequency", "0", "--val-frequency", "0", "--val-every-n-samples", "48", "--evaluate-first")
    attempt = Attempt(Course("elastic", epochs=2, flags=flags), course_data, tmp_path)
    assert main([*attempt.argv(), "--stop-after-steps", "2"]) == 75
    assert main([*attempt.argv(), "--batch-size", "24"]) == 0
    assert [record["step"] for record in records(attempt) if VAL in record] == [0, 2, 4]


def test_after_a_rollback_each_step_has_its_evaluation_once(course_data: Path, tmp_path: Path) -> None:
    flags = ("--on-nonfinite", "rollback", "--max-nonfinite", "1", "--save-every-n-steps", "2", *OFTEN)
    attempt = Attempt(replace(COURSE, flags=flags), course_data, tmp_path)
    report = poisoned_run([*attempt.argv()], 0, {4, 5}, "features")
    assert report.exit_code == 0
    (event,) = [record["event/rollback"] for record in records(attempt) if "event/rollback" in record]
    assert (event["from_step"], event["to_step"]) == (6, 2)
    assert evaluations(attempt) == list(DUE.items())


def test_a_rollback_is_decided_before_an_evaluation_that_is_due(course_data: Path, tmp_path: Path) -> None:
    flags = ("--on-nonfinite", "rollback", "--max-nonfinite", "0", "--save-every-n-steps", "2", *OFTEN)
    attempt = Attempt(replace(COURSE, flags=flags), course_data, tmp_path)
    assert poisoned_run([*attempt.argv()], 0, {3}, "features").exit_code == 0
    (event,) = [record["event/rollback"] for record in records(attempt) if "event/rollback" in record]
    assert (event["from_step"], event["to_step"]) == (3, 2)
    assert evaluations(attempt) == list(DUE.items())


@pytest.mark.parametrize(("lock", "num_built"), [(("--lock-text",), 1), ((), 2 * 4)], ids=["locked", "trained"])
def test_a_run_builds_the_classifier_of_a_locked_text_tower_once_and_its_figures_are_those_of_building_it_each_time(
    course_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: tuple[str, ...], num_built: int
) -> None:
    built: list[int] = []
    build = tasks.build_classifier
    monkeypatch.setattr(tasks, "build_classifier", lambda *args: (built.append(1), build(*args))[1])
    course = replace(COURSE, flags=(*OFTEN, "--model-ema-samples", "16", *lock))
    kept, anew = (Attempt(course, course_data, tmp_path / name) for name in ("kept", "anew"))
    assert main([*kept.argv()]) == 0
    assert len(built) == num_built  # of the weights and of their average, at steps 0, 4, 8 and 12
    monkeypatch.setattr(classifier_cache, "stands_still", lambda model: False)
    assert main([*anew.argv()]) == 0
    assert_as(kept, anew)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--val-every-n-samples", "7"), "--val-every-n-samples 7 is less than the 8 samples of one step"),
        (("--zeroshot-every-n-steps", "0"), "--zeroshot-every-n-steps must be positive, got 0"),
    ],
)
def test_a_cadence_that_cannot_be_is_refused(
    attempt: Attempt, caplog: pytest.LogCaptureFixture, flags: tuple[str, ...], message: str
) -> None:
    assert main([*attempt.argv(), *flags]) == 2
    assert message in caplog.text


def test_a_dry_run_refuses_it_too(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--dry-run", "--dry-run-world-size", "4", "--val-every-n-samples", "31")
    assert main([*attempt.argv(), *flags]) == 2
    assert "--val-every-n-samples 31 is less than the 32 samples of one step" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("seconds_a_batch", "is_told"), [(0.7, False), (4.0, True)])
def test_a_long_evaluation_is_no_stall_but_one_that_stands_still_is(
    course_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_a_batch: float, is_told: bool
) -> None:
    module = sys.modules["training.evaluation.zeroshot"]  # the package has a function of that name
    calls, encode = iter(range(1000)), module.encode_images  # type: ignore[attr-defined]

    def slowly(*args: Any) -> Any:
        if not is_told or next(calls) == 0:
            time.sleep(seconds_a_batch)
        return encode(*args)

    monkeypatch.setattr(module, "encode_images", slowly)
    flags = ("--zeroshot-frequency", "0", "--zeroshot-every-n-steps", "5", "--batch-size", "1", "--stall-timeout", "2")
    attempt = Attempt(Course("slow", epochs=1, flags=flags), course_data, tmp_path)
    assert main([*attempt.argv(), "--stop-after-steps", "5"]) == 75
    log = (attempt.run_dir / "train.log").read_text()
    assert ("no progress for" in log) is is_told
    (record,) = [record for record in records(attempt) if ZEROSHOT in record]
    assert record["step"] == 5
    took = re.search(r"evaluated: shapes (\d+\.\d) s", log)
    assert took is not None and float(took[1]) > 3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_killed_and_stopped_inside_evaluations_are_bitwise_the_undisturbed_one(
    course_data: Path, tmp_path: Path, ranks: int
) -> None:
    flags = (*OFTEN, "--save-every-n-steps", "2", "--model-ema-samples", "16")
    course = Course("often", world_size=ranks, workers=1, epochs=2, flags=flags)
    with Nursery() as nursery:
        whole = run_whole(nursery, course, course_data, tmp_path / "whole")
        attempt = Attempt(course, course_data, tmp_path / "disturbed")
        # With the averaged weights two measurements a set; those of the missing evaluation come first after a kill.
        for place, passes, number in (
            ("evaluation", 1, signal.SIGTERM),  # before the first step
            ("evaluation", 6, signal.SIGKILL),  # step 3, of which there is no checkpoint
            ("classifier", 2, signal.SIGTERM),  # in mid-epoch
            ("evaluation", 4, signal.SIGKILL),
            ("evaluation", 2, signal.SIGTERM),
        ):
            hits = attempt.home / "hits"
            hits.unlink(missing_ok=True)
            blow = (arm, (place, passes, str(attempt.run_dir), str(hits), number))
            children = attempt.start(nursery, [[blow], *([] for _ in range(ranks - 1))])
            codes = [child.finish() for child in children]
            assert hits.exists(), (place, passes, children[0].output)
            if number == signal.SIGTERM:
                assert codes == [75] * ranks, children[0].output
        assert [child.finish() for child in attempt.start(nursery)] == [0] * ranks
        assert_same_run(attempt, whole)
    assert STEPS_AN_EPOCH * course.epochs == 12
