from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from training.errors import RemoteError
from training.evaluation.claim import Claim
from training.evaluation.ledger import Ledger, Measurement
from training.evaluation.lookout import Choice, Lookout
from training.manifest import FileEntry, Manifest

SHAPES = Measurement("shapes")


@dataclass
class StagedRun:
    """A run whose checkpoints are what the test says; 6 steps an epoch."""

    name: str = "run"
    texts: dict[str, str | None] = field(default_factory=dict)
    epochs: int | None = None
    answers: bool = True

    def save(self, name: str, step: int, written_at: float = 1.0) -> None:
        files = {"model.safetensors": FileEntry(10, step)}
        manifest = Manifest(step, step // 6, step * 8, files, written_at)
        self.texts[name] = manifest.to_text()

    def exists(self) -> bool:
        return True

    def manifests(self) -> dict[str, str | None]:
        if not self.answers:
            raise RemoteError("RUN: s3://bucket/run cannot be listed")
        return dict(self.texts)

    def manifest_text(self, name: str) -> str | None:
        return self.texts.get(name)

    def read(self, file: str) -> bytes | None:
        return None if self.epochs is None else f"epochs: {self.epochs}\n".encode()

    def bring(self, name: str, files: Collection[str]) -> Path:
        raise NotImplementedError

    def path_of(self, name: str) -> Path:
        raise NotImplementedError

    def let_go(self) -> None: ...


@pytest.fixture
def run() -> StagedRun:
    return StagedRun()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Claim(tmp_path) as claim, closing(Ledger(tmp_path, claim)) as ledger:
        yield ledger


def names(lookout: Lookout) -> list[str]:
    return [arrival.name for arrival in lookout.look().arrivals]


def measure(lookout: Lookout, ledger: Ledger) -> None:
    for arrival in lookout.look().arrivals:
        for one in arrival.missing:
            ledger.write(arrival.name, arrival.manifest, one, {"val/a": 1.0})
            lookout.done(arrival, one)


def test_the_oldest_comes_first_and_what_is_no_whole_checkpoint_does_not(run: StagedRun, ledger: Ledger) -> None:
    run.save("epoch_1", 6)
    run.save("step_000000004", 4)
    run.texts |= {"step_000000008": None, "step_000000010": "{}"}
    assert names(Lookout(run, ledger, [SHAPES], Choice())) == ["step_000000004", "epoch_1"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(epochs_only=True), ["epoch_1", "epoch_2"]),
        (Choice(every=4), ["step_000000004", "epoch_1", "step_000000008", "epoch_2"]),
    ],
)
def test_fewer_may_be_chosen_and_ends_of_epochs_always_are(
    run: StagedRun, ledger: Ledger, choice: Choice, expected: list[str]
) -> None:
    for name, step in (("step_000000002", 2), ("step_000000004", 4), ("epoch_1", 6)):
        run.save(name, step)
    for name, step in (("step_000000008", 8), ("step_000000010", 10), ("epoch_2", 12)):
        run.save(name, step)
    assert names(Lookout(run, ledger, [SHAPES], choice)) == expected


def test_it_is_over_when_the_last_epoch_is_measured_and_not_before(run: StagedRun, ledger: Ledger) -> None:
    lookout = Lookout(run, ledger, [SHAPES], Choice())
    run.epochs = 2
    assert lookout.look().end == ""
    run.save("epoch_1", 6)
    measure(lookout, ledger)
    assert lookout.look().end == ""
    run.save("epoch_2", 12)
    assert lookout.look().end == "" and names(lookout) == ["epoch_2"]
    measure(lookout, ledger)
    assert "the run is complete" in lookout.look().end
    run.epochs = 3  # its trainer was started again with more
    assert lookout.look().end == ""


def test_a_step_made_anew_is_measured_anew(run: StagedRun, ledger: Ledger) -> None:
    lookout = Lookout(run, ledger, [SHAPES], Choice())
    run.save("epoch_1", 6, written_at=1.0)
    measure(lookout, ledger)
    assert names(lookout) == []
    run.save("epoch_1", 6, written_at=2.0)
    assert names(lookout) == ["epoch_1"]


def test_a_damaged_one_is_not_looked_at_again_until_it_is_another(run: StagedRun, ledger: Ledger) -> None:
    lookout = Lookout(run, ledger, [SHAPES], Choice(once=True))
    run.save("epoch_1", 6, written_at=1.0)
    lookout.damaged(lookout.look().arrivals[0])
    assert lookout.look().end and lookout.num_failed() == 1
    run.save("epoch_1", 6, written_at=2.0)
    assert names(lookout) == ["epoch_1"] and lookout.num_failed() == 0


def test_a_set_that_cannot_be_read_is_tried_three_times(run: StagedRun, ledger: Ledger) -> None:
    other = Measurement("other")
    lookout = Lookout(run, ledger, [SHAPES, other], Choice())
    run.save("epoch_1", 6)
    for _ in range(3):
        (arrival,) = lookout.look().arrivals
        assert arrival.missing == (SHAPES, other)
        lookout.failed(arrival, SHAPES)
    (arrival,) = lookout.look().arrivals
    assert arrival.missing == (other,)
    measure(lookout, ledger)
    assert names(lookout) == [] and lookout.num_failed() == 1


def test_a_set_that_could_be_read_at_last_is_no_failure(run: StagedRun, ledger: Ledger) -> None:
    lookout = Lookout(run, ledger, [SHAPES], Choice())
    run.save("epoch_1", 6)
    lookout.failed(lookout.look().arrivals[0], SHAPES)
    lookout.failed(lookout.look().arrivals[0])
    assert lookout.num_failed() == 1
    measure(lookout, ledger)
    assert lookout.num_failed() == 0


def test_a_remote_that_no_longer_answers_is_told_once_and_asked_again(
    run: StagedRun, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    lookout = Lookout(run, ledger, [SHAPES], Choice())
    run.save("epoch_1", 6)
    assert names(lookout) == ["epoch_1"]
    run.answers = False
    assert names(lookout) == names(lookout) == []
    assert caplog.text.count("cannot be listed; looking again") == 1
    run.answers = True
    assert names(lookout) == ["epoch_1"]


def test_a_remote_that_has_never_answered_is_an_error(run: StagedRun, ledger: Ledger) -> None:
    run.answers = False
    with pytest.raises(RemoteError):
        Lookout(run, ledger, [SHAPES], Choice()).look()


def test_a_damaged_manifest_is_named_once_and_one_that_is_not_there_yet_is_not(
    run: StagedRun, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    run.texts |= {"epoch_1": "{}", "epoch_2": None}
    lookout = Lookout(run, ledger, [SHAPES], Choice())
    assert names(lookout) == []
    run.save("epoch_3", 18)
    assert names(lookout) == ["epoch_3"] and lookout.num_failed() == 1
    assert caplog.text.count("epoch_1 is passed over: its manifest.json is damaged") == 1
    assert "epoch_2" not in caplog.text


def test_it_is_over_after_idle_minutes_and_news_begin_them_anew(
    run: StagedRun, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("training.evaluation.lookout.time.monotonic", lambda: now[0])
    lookout = Lookout(run, ledger, [SHAPES], Choice(idle_minutes=2))
    now[0] += 119
    assert lookout.look().end == ""
    run.save("epoch_1", 6)
    measure(lookout, ledger)
    now[0] += 119
    assert lookout.look().end == ""
    now[0] += 2
    assert lookout.look().end == "no new checkpoint has come for long"
