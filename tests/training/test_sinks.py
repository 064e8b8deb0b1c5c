from __future__ import annotations

import importlib.util
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from training import sinks
from training.errors import ConfigError
from training.metrics import MetricsLog, read_metrics
from training.sinks import (
    SinkSettings,
    SinkThread,
    Trackers,
    build_trackers,
    new_wandb_id,
    parse_report_to,
    plottable,
)


def record(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "samples_seen": step * 8, "time": 1e9 + step, **values}


class ListSink:
    """Keeps what it gets; `act` is what goes wrong."""

    def __init__(self, act: Callable[[], None] = lambda: None):
        self.records: list[Mapping[str, Any]] = []
        self.closed = False
        self.abandoned = False
        self._act = act

    def write(self, record: Mapping[str, Any]) -> None:
        self._act()
        self.records.append(record)

    def close(self) -> None:
        self.closed = True

    def abandon(self) -> None:
        self.abandoned = True


def fail() -> None:
    raise ConnectionError("https://user:key@tracker is unreachable\nmore of it")


# ---- which


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("wandb", ("wandb",)),
        (" tensorboard , wandb,", ("tensorboard", "wandb")),
        ("wandb,wandb", ("wandb",)),
        ("all", ("wandb", "tensorboard")),
    ],
)
def test_the_flag_names_sinks(text: str, names: tuple[str, ...]) -> None:
    assert parse_report_to(text) == names


def test_an_unknown_sink_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker 'tensorbord'; did you mean tensorboard\?"):
        parse_report_to("tensorbord")


def test_a_missing_package_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        build_trackers(("wandb",), SinkSettings(tmp_path, "run"))


def test_wandb_ids_differ() -> None:
    assert len({new_wandb_id() for _ in range(50)}) == 50
    assert all(character.isalnum() for character in new_wandb_id())


# ---- safety


def test_records_arrive_in_order_and_the_sink_is_closed() -> None:
    sink = ListSink()
    trackers = Trackers([SinkThread("list", lambda: sink)])
    for step in range(50):
        trackers.write(record(step))
    trackers.close()
    assert [entry["step"] for entry in sink.records] == list(range(50))
    assert sink.closed


def test_without_sinks_nothing_happens() -> None:
    trackers = Trackers()
    trackers.write(record(1))
    trackers.close()


@pytest.mark.parametrize("where", ["build", "write"])
def test_a_sink_that_raises_is_dropped_with_one_masked_line(where: str, caplog: pytest.LogCaptureFixture) -> None:
    good = ListSink()
    build: Callable[[], Any] = fail if where == "build" else lambda: ListSink(fail)
    broken = SinkThread("broken", build)
    trackers = Trackers([broken, SinkThread("good", lambda: good)])
    for step in range(5):
        trackers.write(record(step))
    trackers.close()
    assert broken.dropped and len(good.records) == 5
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
    assert caplog.records[0].getMessage() == (
        "tracker broken dropped, the run goes on without it: ConnectionError: https://***@tracker is unreachable"
    )


def test_a_sink_that_exits_the_program_is_dropped_too() -> None:
    def leave() -> None:
        raise SystemExit(1)

    sink = SinkThread("leaver", lambda: ListSink(leave))
    sink.write(record(1))
    Trackers([sink]).close()
    assert sink.dropped


def test_a_sink_that_blocks_delays_neither_steps_nor_the_end(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    sink = SinkThread("stuck", lambda: ListSink(lambda: release.wait(30) and None))
    started = time.monotonic()
    for step in range(10):
        sink.write(record(step))
    Trackers([sink]).close(timeout_s=0.2)
    release.set()
    assert time.monotonic() - started < 5
    assert sink.dropped
    assert caplog.text.count("dropped") == 1 and "did not finish in time" in caplog.text


def test_a_sink_that_falls_behind_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    sink = SinkThread("slow", lambda: ListSink(lambda: release.wait(30) and None), queue_length=4)
    for step in range(20):
        sink.write(record(step))
    release.set()
    assert sink.dropped
    assert caplog.text.count("did not take 4 records") == 1


def test_the_file_is_whole_whatever_the_sinks_do(tmp_path: Path) -> None:
    trackers = Trackers([SinkThread("broken", lambda: ListSink(fail))])
    with MetricsLog(tmp_path, None, trackers) as log:
        for step in range(20):
            log.write({"loss": 1.0}, step=step, epoch=0, samples_seen=step)
    trackers.close()
    assert [entry["step"] for entry in read_metrics(log.path)] == list(range(20))


def test_only_numbers_are_plotted_and_gaps_show() -> None:
    values = plottable(record(1, loss=0.5, note="x", gap=None, nonfinite=["gap"], ok=True))
    assert values.keys() == {"loss", "gap", "ok"}
    assert values["loss"] == 0.5 and math.isnan(values["gap"])


# ---- the real ones


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_files_are_written_and_continue_at_the_checkpoint(tmp_path: Path) -> None:
    for resume_step, steps in ((None, (1, 2, 3, 4)), (2, (3, 4, 5))):
        settings = SinkSettings(tmp_path, "run", {"url": "https://u:secret@h"}, resume_step)
        trackers = build_trackers(("tensorboard",), settings)
        for step in steps:
            trackers.write(record(step, loss=step + (resume_step or 0) / 10))
        trackers.close(30)
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2), (5, 5.2)]
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
def test_wandb_offline_writes_its_run_with_our_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = SinkSettings(tmp_path, "run", {"url": "https://u:secretword@h"}, wandb_run_id="abcd1234")
    sink = sinks.WandbSink(settings)
    for step in range(3):
        sink.write(record(step, loss=1 / (step + 1)))
    sink.close()
    files = list((tmp_path / "wandb").glob("offline-run-*/*abcd1234.wandb"))
    assert len(files) == 1
    deadline = time.monotonic() + 20
    while b"loss" not in (content := files[0].read_bytes()):  # W&B's own process writes the file
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert b"secretword" not in content


@pytest.mark.slow
def test_wandb_works_from_its_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = build_trackers(("wandb",), SinkSettings(tmp_path, "run", wandb_run_id=new_wandb_id()))
    trackers.write(record(1, loss=0.5))
    trackers.close(60)
    assert "dropped" not in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("mode", "writer", "shared"),
    [
        (None, "", None),
        (None, "evaluations", "shared"),
        ("online", "evaluations", "shared"),
        ("offline", "evaluations", None),
        ("disabled", "evaluations", None),
    ],
)
def test_a_second_writer_joins_the_trainers_wandb_run_and_does_not_end_it(
    mode: str | None, writer: str, shared: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What `wandb.init` is called with; nobody answers here."""
    import wandb

    seen: dict[str, Any] = {}
    monkeypatch.delenv("WANDB_MODE")
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb, "init", lambda **given: seen.update(given) or Recorder())
    sinks.WandbSink(SinkSettings(tmp_path, "run", wandb_run_id="abcd1234", writer=writer))
    settings = seen["settings"].model_dump(exclude_unset=True)
    assert seen["id"] == "abcd1234" and seen["resume"] == "allow"
    beside = {"x_primary": False, "x_update_finish_state": False, "x_label": "evaluations"} if writer else {}
    assert {name: value for name, value in settings.items() if name.startswith("x_")} == beside
    assert settings.get("mode") == shared
    assert seen["dir"] == str(tmp_path / writer)


class Recorder:
    """A W&B run that takes everything."""

    def define_metric(self, name: str, step_metric: str) -> None: ...


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_second_writer_leaves_the_trainers_event_files_alone(tmp_path: Path) -> None:
    settings = SinkSettings(tmp_path, "run", {"lr": 1})
    trainer = build_trackers(("tensorboard",), settings)
    beside = build_trackers(("tensorboard",), SinkSettings(tmp_path, "run", writer="evaluations"))
    for step in (1, 2, 3):
        trainer.write(record(step, loss=step))
        beside.write(record(step, top1=step / 10))
    for trackers in (trainer, beside):
        trackers.close(30)
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert scalars(tmp_path / "tensorboard" / "evaluations", "top1") == [(1, 0.1), (2, 0.2), (3, 0.3)]
