"""The second copy of a run: what is brought, what is left out, what failures do. Threads are waited for, not timed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.process import poll
from tests.training.conftest import FakeWorld, tensors_of
from training import remote as remote_module
from training import uploader as uploader_module
from training.checkpoint import Checkpointer
from training.checkpoint_content import Progress, epoch_name, step_name
from training.checkpoint_files import list_checkpoints, verify_checkpoint, write_checkpoint
from training.distributed import World
from training.errors import RemoteError
from training.manifest import read_manifest_text
from training.preemption import Preemption
from training.remote import Remote
from training.rotation import discard
from training.uploader import Uploader, finish_upload

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run without checkpoints, with its configuration and a line of metrics."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: run\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


@pytest.fixture
def away(tmp_path: Path) -> GatedRemote:
    """A remote on the local disk."""
    return GatedRemote(f"{tmp_path}/away/run")


class GatedRemote(Remote):
    """Uploads wait for the gate, which is open at first. `asked`: what was done; `numbers`: the metrics before it."""

    def __init__(self, url: str):
        super().__init__(url)
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.asked: list[tuple[str, str]] = []
        self.numbers: list[bytes | None] = []
        self.broken: Exception | None = None

    def upload(self, folder: Path, manifest_text: str) -> int:
        self.asked.append(("upload", folder.name))
        self.numbers.append(self.read("metrics.jsonl"))
        self.entered.set()
        assert self.gate.wait(LIMIT_S)
        return super().upload(folder, manifest_text)

    def manifests(self) -> dict[str, str | None]:
        self._fail()
        return super().manifests()

    def write(self, name: str, content: bytes) -> None:
        self._fail()
        super().write(name, content)

    def discard(self, name: str) -> None:
        self.asked.append(("discard", name))
        super().discard(name)

    def uploads(self) -> list[str]:
        return [name for what, name in self.asked if what == "upload"]

    def _fail(self) -> None:
        if self.broken is not None:
            raise RemoteError(f"{self} is broken") from self.broken


def uploader_of(run_dir: Path, away: Remote, **options: Any) -> Uploader:
    return Uploader(away, run_dir, **({"keep_last": 2, "delete_previous": False} | options))


def save(run_dir: Path, name: str, step: int, value: int | None = None) -> Path:
    folder = run_dir / "checkpoints" / name
    write_checkpoint(
        folder, {"model.safetensors": tensors_of(value or step)}, {}, step=step, epoch=0, samples_seen=8 * step
    )
    return folder


def there(away: Remote) -> list[str]:
    """What a reader would take at the remote."""
    return [name for name, text in Remote(away.url).manifests().items() if text is not None]


def settle(uploader: Uploader) -> None:
    """Until everything is brought."""
    poll(lambda: not uploader.remark(), LIMIT_S, "everything at the remote")


def assert_soon_there(away: GatedRemote, names: list[str]) -> None:
    """What is brought is there first; what it replaces goes a moment later."""
    poll(lambda: there(away) == names, LIMIT_S, f"{names} at the remote")


# ---- what is brought


def test_checkpoints_configuration_and_metrics_are_brought(run_dir: Path, away: GatedRemote) -> None:
    with uploader_of(run_dir, away) as uploader:
        folder = save(run_dir, "step_000000003", 3)
        uploader.wake()
        settle(uploader)
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4}\n{"step": 5')  # the last line is on its way
        uploader.wake()
        settle(uploader)
        assert Remote(away.url).manifests() == {"step_000000003": read_manifest_text(folder)}
        assert away.read("config.yaml") == b"name: run\n"
        assert away.read("metrics.jsonl") == b'{"step": 1}\n{"step": 4}\n'


def test_evaluations_made_beside_the_training_are_brought_where_there_are_any(run_dir: Path, away: GatedRemote) -> None:
    with uploader_of(run_dir, away) as uploader:
        settle(uploader)
        assert away.read("evaluations.jsonl") is None and not uploader.remark()
        (run_dir / "evaluations.jsonl").write_text('{"step": 1, "val/a": 0.5}\n{"step": 1, "val/b')
        uploader.wake()
        settle(uploader)
        assert away.read("evaluations.jsonl") == b'{"step": 1, "val/a": 0.5}\n' and not uploader.remark()


def test_the_numbers_are_at_the_remote_before_the_checkpoint_is(run_dir: Path, away: GatedRemote) -> None:
    away.gate.clear()
    save(run_dir, step_name(1), 1)
    with uploader_of(run_dir, away) as uploader:
        assert away.entered.wait(LIMIT_S)
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2}\n')
        save(run_dir, step_name(2), 2)
        away.gate.set()
        settle(uploader)
    assert away.numbers == [b'{"step": 1}\n', b'{"step": 1}\n{"step": 2}\n']


def test_what_an_earlier_process_left_undone_is_brought_at_the_start(run_dir: Path, away: GatedRemote) -> None:
    for epoch in (1, 2):
        save(run_dir, epoch_name(epoch), 10 * epoch)
    save(run_dir, step_name(25), 25)
    with uploader_of(run_dir, away) as uploader:
        settle(uploader)
    assert away.uploads() == [step_name(25), "epoch_2", "epoch_1"]


def test_what_is_there_already_is_not_brought_again(run_dir: Path, away: GatedRemote) -> None:
    save(run_dir, "epoch_1", 10)
    for _ in range(2):
        with uploader_of(run_dir, away) as uploader:
            settle(uploader)
    assert away.uploads() == ["epoch_1"]


def test_rotation_at_the_remote_follows_the_rules_of_the_run(run_dir: Path, away: GatedRemote) -> None:
    with uploader_of(run_dir, away, keep_last=2) as uploader:
        for step in range(1, 13):
            save(run_dir, epoch_name(step // 4) if step % 4 == 0 else step_name(step), step)
            uploader.wake()
            settle(uploader)
    assert_soon_there(away, ["epoch_1", "epoch_2", "epoch_3", step_name(10), step_name(11)])


def test_the_previous_epoch_goes_at_the_remote_too(run_dir: Path, away: GatedRemote) -> None:
    with uploader_of(run_dir, away, delete_previous=True) as uploader:
        for epoch in (1, 2, 3):
            save(run_dir, epoch_name(epoch), 10 * epoch)
            uploader.wake()
            settle(uploader)
    assert_soon_there(away, ["epoch_3"])
    order = [entry for entry in away.asked if entry[1] in ("epoch_1", "epoch_2")]
    assert order.index(("upload", "epoch_2")) < order.index(("discard", "epoch_1"))


def test_step_checkpoints_overtaken_by_newer_ones_are_left_out_and_epochs_never(
    run_dir: Path, away: GatedRemote
) -> None:
    save(run_dir, step_name(1), 1)
    away.gate.clear()
    with uploader_of(run_dir, away, keep_last=5) as uploader:
        assert away.entered.wait(LIMIT_S)
        for step in range(2, 10):
            save(run_dir, epoch_name(step // 4) if step % 4 == 0 else step_name(step), step)
            uploader.wake()
        away.gate.set()
        settle(uploader)
    assert away.uploads() == [step_name(1), step_name(9), "epoch_2", "epoch_1"]


def test_half_an_upload_of_an_earlier_process_is_removed(run_dir: Path, away: GatedRemote, tmp_path: Path) -> None:
    half = tmp_path / "away/run/checkpoints/step_000000002"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    save(run_dir, step_name(4), 4)
    with uploader_of(run_dir, away) as uploader:
        settle(uploader)
        poll(lambda: not half.exists(), LIMIT_S, "the rest removed")


def test_a_run_behind_its_remote_neither_loses_its_own_checkpoint_there_nor_brings_it_for_ever(
    run_dir: Path, away: GatedRemote, tmp_path: Path
) -> None:
    for step in (100, 110):
        away.upload(folder := save(tmp_path / "elsewhere", step_name(step), step), read_manifest_text(folder) or "")
    away.asked.clear()
    save(run_dir, step_name(50), 50)
    with uploader_of(run_dir, away, keep_last=1) as uploader:
        settle(uploader)
        uploader.finish()
        assert uploader.ended(LIMIT_S)
    assert_soon_there(away, [step_name(50), step_name(110)])
    assert away.uploads() == [step_name(50)]


# ---- under the uploader's hands


def states(step: int) -> dict[str, Any]:
    return {
        "progress": Progress(step=step, epoch=0, samples_seen=8 * step),
        "model_state": {"weight": torch.full((3,), float(step))},
        "optimizer_state": {},
        "data_position": {},
        "config": {},
        "model_config": {},
    }


def test_saving_goes_on_during_a_slow_upload_and_rotation_leaves_alone_what_it_reads(
    run_dir: Path, away: GatedRemote, world: FakeWorld
) -> None:
    away.gate.clear()
    with (
        uploader_of(run_dir, away, keep_last=1) as uploader,
        Checkpointer(run_dir / "checkpoints", world, keep_last=1, uploader=uploader) as checkpointer,  # type: ignore[arg-type]
    ):
        checkpointer.save(step_name(1), **states(1))
        assert away.entered.wait(LIMIT_S)
        for step in (2, 3, 4):
            checkpointer.save(step_name(step), **states(step))
        checkpointer.wait()
        names = [folder.name for folder in list_checkpoints(run_dir / "checkpoints")]
        assert names == [step_name(4), step_name(1)]
        away.gate.set()
        settle(uploader)
        assert_soon_there(away, [step_name(4)])
        assert away.uploads() == [step_name(1), step_name(4)]
        checkpointer.save(step_name(5), **states(5))
        checkpointer.wait()
        assert [folder.name for folder in list_checkpoints(run_dir / "checkpoints")][-1] != step_name(1)


def test_a_rollback_removes_the_future_that_is_given_up_and_replaces_what_keeps_its_name(
    run_dir: Path, away: GatedRemote
) -> None:
    with uploader_of(run_dir, away, keep_last=5) as uploader:
        for step in (10, 20, 30):
            save(run_dir, step_name(step), step)
            uploader.wake()
            settle(uploader)
        discard([run_dir / "checkpoints" / step_name(step) for step in (20, 30)])
        uploader.rewind(80)
        save(run_dir, step_name(10), 10, value=77)
        uploader.wake()
        settle(uploader)
        poll(lambda: there(away) == [step_name(10)], LIMIT_S, "only the new step 10")
        fetched = away.fetch(step_name(10), run_dir / "fetched")
        assert read_manifest_text(fetched) == read_manifest_text(run_dir / "checkpoints" / step_name(10))
        # Later steps of the new future have the old names, and stay.
        save(run_dir, step_name(20), 20, value=78)
        uploader.wake()
        settle(uploader)
    assert_soon_there(away, [step_name(10), step_name(20)])


def test_a_checkpoint_given_up_during_its_upload_is_not_left_at_the_remote(run_dir: Path, away: GatedRemote) -> None:
    save(run_dir, step_name(10), 10)
    with uploader_of(run_dir, away) as uploader:
        settle(uploader)
        away.gate.clear()
        away.entered.clear()
        save(run_dir, step_name(20), 20)
        uploader.wake()
        assert away.entered.wait(LIMIT_S)
        discard([run_dir / "checkpoints" / step_name(20)])
        uploader.rewind(80)
        save(run_dir, step_name(10), 10, value=77)
        uploader.wake()
        away.gate.set()
        settle(uploader)
        poll(lambda: there(away) == [step_name(10)], LIMIT_S, "only step 10")
    assert verify_checkpoint(away.fetch(step_name(10), run_dir / "fetched")).step == 10


# ---- failures


def test_a_remote_that_fails_warns_once_and_has_everything_when_it_works_again(
    run_dir: Path, away: GatedRemote, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    away.broken = FileNotFoundError("The specified bucket does not exist")
    save(run_dir, "epoch_1", 10)
    with uploader_of(run_dir, away, every_s=0.01) as uploader:
        poll(lambda: "is broken; the run goes on" in caplog.text, LIMIT_S, "the warning")
        time.sleep(0.3)  # some more rounds
        assert "epoch_1, config.yaml, metrics.jsonl" in uploader.remark() and "is broken" in uploader.remark()
        away.broken = None
        settle(uploader)
        poll(lambda: "works again and has everything" in caplog.text, LIMIT_S, "the good news")
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert there(away) == ["epoch_1"]


def test_everything_is_brought_again_where_the_remote_was_emptied_and_failed(
    run_dir: Path, away: GatedRemote, tmp_path: Path
) -> None:
    save(run_dir, "epoch_1", 10)
    with uploader_of(run_dir, away) as uploader:
        settle(uploader)
        Remote(away.url).discard("epoch_1")
        away.broken = OSError("reset")
        save(run_dir, "epoch_2", 20)
        (run_dir / "metrics.jsonl").write_text('{"step": 20}\n')
        uploader.wake()
        poll(lambda: uploader.remark(), LIMIT_S, "the failure")
        poll(lambda: uploader._failure, LIMIT_S, "the failure")
        away.broken = None
        uploader.wake()
        poll(lambda: there(away) == ["epoch_1", "epoch_2"], LIMIT_S, "both epochs")


def test_a_bug_of_a_client_does_not_end_the_copy(
    run_dir: Path, away: GatedRemote, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(self: object, name: str, content: bytes) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(GatedRemote, "write", bug)
        uploader = uploader_of(run_dir, away, every_s=0.01)
        with uploader:
            poll(lambda: "a bug" in caplog.text, LIMIT_S, "the warning")
            patch.undo()
            settle(uploader)


# ---- the end


@pytest.fixture
def preemption() -> Preemption:
    """Nobody asks for a stop, and the job has no end."""
    return Preemption(environment={})


def test_the_end_waits_for_the_last_upload_and_then_nothing_is_missing(
    run_dir: Path, away: GatedRemote, preemption: Preemption, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    away.gate.clear()
    with uploader_of(run_dir, away) as uploader:
        save(run_dir, "epoch_1", 10)
        threading.Timer(2.0, away.gate.set).start()
        assert finish_upload(uploader, World(), preemption) == ""
    assert there(away) == ["epoch_1"] and "waiting for the upload, at most" in caplog.text


def test_the_end_tries_once_more_and_names_what_is_missing(
    run_dir: Path, away: GatedRemote, preemption: Preemption
) -> None:
    away.broken = ConnectionError("no network")
    with uploader_of(run_dir, away) as uploader:
        save(run_dir, "epoch_1", 10)
        remark = finish_upload(uploader, World(), preemption)
    assert remark.startswith(f"not brought to {away}: epoch_1, config.yaml, metrics.jsonl (") and "broken" in remark


def test_an_upload_that_hangs_is_given_up_shortly_before_the_end_of_the_job(
    run_dir: Path, away: GatedRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader_module, "_BEFORE_END_S", 6.0)
    away.gate.clear()
    save(run_dir, "epoch_1", 10)
    with uploader_of(run_dir, away) as uploader:
        assert away.entered.wait(LIMIT_S)
        now = time.time()
        preemption = Preemption(environment={"CLIPYARD_END_TIME": str(now + 8.0)}, margin_s=1.0)
        remark = finish_upload(uploader, World(), preemption)
        assert "epoch_1" in remark and "there was no time" in remark
        away.gate.set()


@pytest.mark.parametrize(
    ("end_in_s", "is_asked", "expected"),
    [(None, False, 600), (None, True, 60), (100, False, 85), (100, True, 85), (5000, False, 600), (5000, True, 60)],
)
def test_the_last_upload_may_take_until_shortly_before_an_end_that_is_near(
    end_in_s: float | None, is_asked: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {} if end_in_s is None else {"CLIPYARD_END_TIME": str(1000 + end_in_s)}
    preemption = Preemption(environment=environment, margin_s=1, clock=lambda: 1000.0)
    if is_asked:
        monkeypatch.setattr(preemption, "requested", lambda: "signal USR1")
    left = uploader_module._seconds_left(preemption, time.monotonic())
    assert left == pytest.approx(expected, abs=5)


def test_ranks_without_an_uploader_have_nothing_to_wait_for(preemption: Preemption) -> None:
    assert finish_upload(None, World(), preemption) == ""


def test_after_an_error_what_is_on_its_way_is_finished(run_dir: Path, away: GatedRemote) -> None:
    save(run_dir, "epoch_1", 10)

    def fail(work: Callable[[], object]) -> None:
        with uploader_of(run_dir, away):
            assert away.entered.wait(LIMIT_S)
            work()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(away.gate.set)
    assert there(away) == ["epoch_1"]
