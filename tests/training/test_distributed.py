"""Sessions of several ranks: agreements, shared errors, and the roll call."""

from __future__ import annotations

import time

import pytest

from models.errors import ConfigError
from tests.helpers.gloo import run_ranks
from training.config import ClusterConfig
from training.distributed import World, session
from training.errors import PeerError, StoppedEarly


def _agree() -> tuple[int, bool, list[int], str]:
    with session(ClusterConfig(device="cpu")) as world:
        return (
            world.max_int(world.rank),
            world.any(world.rank == 1),
            world.all_gather_object(world.rank),
            world.on_main(lambda: f"from {world.rank}"),
        )


def test_ranks_agree_on_numbers_flags_and_objects() -> None:
    assert run_ranks(_agree, 2) == [(1, True, [0, 1], "from 0")] * 2


def _one_fails() -> tuple[str, str, int]:
    with session(ClusterConfig(device="cpu")) as world:
        try:
            with world.collectively("reading"):
                if world.rank == 1:
                    raise ConfigError("no such bucket")
        except (ConfigError, PeerError) as error:
            return type(error).__name__, str(error), error.exit_code
    return "", "", 0


def test_what_one_rank_finds_all_ranks_raise_with_its_exit_code() -> None:
    assert run_ranks(_one_fails, 2) == [
        ("PeerError", "reading: rank 1: no such bucket", 2),
        ("ConfigError", "no such bucket", 2),
    ]


def _stop_while_rank_0_works() -> tuple[bool, float]:
    with session(ClusterConfig(device="cpu", dist_timeout_s=20)) as world:
        started = time.monotonic()
        try:
            world.on_main_at_length(lambda: time.sleep(600), should_stop=lambda: world.rank == 1)
        except StoppedEarly:
            return True, time.monotonic() - started
    return False, 0.0


def test_long_work_of_rank_0_is_left_by_all_when_another_rank_is_asked_to_stop() -> None:
    for stopped, seconds in run_ranks(_stop_while_rank_0_works, 2):
        assert stopped
        assert seconds < 60


def _join(timeout_s: float) -> str:
    try:
        with session(ClusterConfig(device="cpu", rendezvous_timeout_s=timeout_s)):
            return "joined"
    except ConfigError as error:
        return str(error)


def test_a_missing_rank_is_named_within_the_time_limit() -> None:
    (said,) = run_ranks(_join, 1, 2.0, env={"WORLD_SIZE": "3"})
    assert "1 of 3 ranks came within 2 s, 1 on " in said and "; missing: 1, 2. Likely: " in said


def test_a_world_of_one_needs_no_process_group() -> None:
    world = World()
    assert world.is_main and world.all_gather_object("x") == ["x"]
    with pytest.raises(ConfigError), world.collectively("x"):
        raise ConfigError("plain")


def _gathered() -> tuple[list[str] | None, str]:
    with session(ClusterConfig(device="cpu")) as world:
        values = world.gather_object("x" * 10**world.rank)
        try:
            with world.collectively("counting"):
                if world.rank == 1:
                    raise ConfigError("one is missing")
        except (ConfigError, PeerError) as error:
            return values, str(error)
        return values, ""


def test_values_of_any_length_come_together_on_rank_0_and_an_error_reaches_all() -> None:
    results = run_ranks(_gathered, 3)
    assert results[0] == (["x", "x" * 10, "x" * 100], "counting: rank 1: one is missing")
    assert results[1:] == [(None, "one is missing"), (None, "counting: rank 1: one is missing")]


def _long_work(seconds: float, fails: bool) -> str:
    with session(ClusterConfig(device="cpu", dist_timeout_s=5.0)) as world:

        def work() -> str:
            time.sleep(seconds)
            if fails:
                raise ConfigError("it was in vain")
            return f"by rank {world.rank}"

        try:
            return world.on_main_at_length(work, "long work")
        except (ConfigError, PeerError) as error:
            return f"{type(error).__name__}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_rank_0_may_work_for_longer_than_a_collective_may_take(fails: bool) -> None:
    expected = ["ConfigError: it was in vain", "PeerError: long work: rank 0: it was in vain"]
    assert run_ranks(_long_work, 2, 12.0, fails) == (expected if fails else ["by rank 0"] * 2)


def test_a_world_of_one_works_at_length_too() -> None:
    assert World().on_main_at_length(lambda: 3) == 3
    with pytest.raises(ConfigError):
        World().on_main_at_length(_raise_config_error)


def _raise_config_error() -> None:
    raise ConfigError("plain")
