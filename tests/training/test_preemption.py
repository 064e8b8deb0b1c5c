from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from training.preemption import SIGNALS, Preemption, read_deadline

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_a_request_with_its_name(number: signal.Signals) -> None:
    with Preemption(environment={}) as preemption:
        assert preemption.requested() is None
        os.kill(os.getpid(), number)
        assert preemption.requested() == f"signal {number.name}"


def test_a_second_interrupt_interrupts() -> None:
    with Preemption(environment={}) as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_interrupt_after_a_signal_of_the_scheduler_is_not_the_second() -> None:
    with Preemption(environment={}) as preemption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested() == "signal SIGINT"


def test_handlers_are_put_back_on_every_path() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), Preemption(environment={}):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_it_works_without_handlers() -> None:
    answers: list[str | None] = []

    def ask() -> None:
        with Preemption(environment={"CLIPYARD_END_TIME": "1000"}, margin_s=10, clock=iter([900, 995]).__next__) as it:
            answers.append(it.requested())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == ["the job ends in 5 s"]


@pytest.mark.parametrize("variable", ["SLURM_JOB_END_TIME", "CLIPYARD_END_TIME"])
def test_the_end_of_the_job_is_a_request_ahead_of_time(variable: str) -> None:
    now = [1000.0]
    preemption = Preemption(environment={variable: "5000"}, margin_s=300, clock=lambda: now[0])
    now[0] = 4699
    assert preemption.requested() is None
    now[0] = 4701
    assert preemption.requested() == "the job ends in 299 s"


def test_a_job_shorter_than_the_margin_still_gets_half_of_its_time() -> None:
    assert read_deadline({"SLURM_JOB_END_TIME": "1100"}, margin_s=300, now=1000) == (1100, 1050)


@pytest.mark.parametrize("text", ["Unknown", "900", "nan"])
def test_an_end_time_that_cannot_be_is_ignored_with_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert read_deadline({"SLURM_JOB_END_TIME": text}, margin_s=300, now=1000) == (None, None)
    assert "ignored" in caplog.text


def test_our_own_variable_comes_before_that_of_slurm() -> None:
    both = {"SLURM_JOB_END_TIME": "9000", "CLIPYARD_END_TIME": "2000"}
    assert read_deadline(both, margin_s=100, now=1000) == (2000, 1900)


WITH_CHILD = """
import multiprocessing, os, signal, time
from training.preemption import Preemption

def wait(ready):
    ready.set()
    time.sleep(60)

with Preemption(environment={}) as preemption:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=wait, args=(ready,), daemon=True)
    child.start()
    ready.wait()
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert child.is_alive() and preemption.requested() is None
    child.kill()
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_loader_worker_outlives_the_signal_and_decides_nothing() -> None:
    subprocess.run([sys.executable, "-c", WITH_CHILD], cwd=REPOSITORY, check=True, timeout=60)
