"""Settings against the defaults and against each other."""

from __future__ import annotations

from training.config import TrainConfig, to_flat
from training.folder import plain
from training.run_report.settings import changed, differing

DEFAULTS = plain(to_flat(TrainConfig()))


def test_the_defaults_as_a_run_writes_them_are_not_marked() -> None:
    assert changed(DEFAULTS) == []


def test_what_is_set_is_marked_and_so_is_what_this_version_does_not_know() -> None:
    assert changed(DEFAULTS | {"lr": 1e-3, "caption_key": ["json:x"], "unheard_of": 1}) == [
        "caption_key",
        "lr",
        "unheard_of",
    ]


def test_runs_differ_in_values_and_in_what_they_know() -> None:
    assert differing([{"lr": 1, "wd": 2}, {"lr": 1, "wd": 3, "new": None}]) == ["wd", "new"]
