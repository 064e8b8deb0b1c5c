from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.process import poll
from tests.helpers.slurm import SlurmCluster
from training.preemption import FROM_CLUSTER, SIGNALS, Preemption, ask_slurm, read_end

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_a_request_with_its_name(number: signal.Signals) -> None:
    with Preemption(environment={}) as preemption:
        assert preemption.requested() is None
        os.kill(os.getpid(), number)
        poll(preemption.requested, 30, "request")
        assert preemption.requested() == f"signal {number.name}"


def test_a_second_interrupt_interrupts() -> None:
    with Preemption(environment={}) as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_interrupt_after_a_signal_of_the_scheduler_is_not_the_second() -> None:
    with Preemption(environment={}) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        poll(preemption.requested, 30, "request")
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
    now = [1000.0]
    preemption = Preemption(environment={"SLURM_JOB_END_TIME": "1100"}, margin_s=300, clock=lambda: now[0])
    now[0] = 1049
    assert preemption.requested() is None
    now[0] = 1051
    assert preemption.requested() == "the job ends in 49 s"


def test_what_saving_and_uploading_take_comes_on_top_of_the_margin() -> None:
    now = [1000.0]
    preemption = Preemption(environment={"CLIPYARD_END_TIME": "9000"}, margin_s=100, clock=lambda: now[0])
    preemption.allow_for("save", 700)
    preemption.allow_for("save", 500)
    preemption.allow_for("upload", 250)
    now[0] = 9000 - 100 - 2 * 750 - 1
    assert preemption.requested() is None
    now[0] += 1
    assert preemption.requested() == "the job ends in 1600 s"


@pytest.mark.parametrize("text", ["Unknown", "900", "nan"])
def test_an_end_time_that_cannot_be_is_ignored_with_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert read_end({"SLURM_JOB_END_TIME": text}, now=1000) is None
    assert "ignored" in caplog.text


def test_our_own_variable_comes_before_that_of_slurm() -> None:
    assert read_end({"SLURM_JOB_END_TIME": "9000", "CLIPYARD_END_TIME": "2000"}, now=1000) == 2000


# ---- the end of the job as Slurm knows it


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A stand-in for the command, in New York; returns the file in which it notes its arguments."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()

    def install(body: str) -> Path:
        calls = tmp_path / "calls"
        script = tmp_path / "squeue"
        script.write_text(f'#!/bin/sh\necho "$@ $SLURM_TIME_FORMAT" >> {calls}\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return calls

    yield install
    monkeypatch.undo()
    time.tzset()


JOB = {"SLURM_JOB_ID": "77"}


def test_under_slurm_the_end_is_asked_for_and_read_as_local_time(squeue: Callable[[str], Path]) -> None:
    calls = squeue("echo 76 2030-01-01T00:00:00; echo 77 2030-07-02T03:04:05")
    with Preemption(environment=dict(os.environ) | JOB, clock=lambda: 1.9e9) as preemption:
        # 3:04 in New York in summer is 7:04 in Greenwich.
        assert preemption.seconds_to_end() == 1909206245 - 1.9e9
    assert calls.read_text() == "-h -j 77 -o %A %e standard\n"


@pytest.mark.parametrize(
    "place", [{"SLURM_PROCID": "3"}, {"RANK": "1", "SLURM_PROCID": "0"}, {"CLIPYARD_END_TIME": "2e9"}]
)
def test_one_rank_asks_slurm_and_only_where_the_environment_does_not_say(
    squeue: Callable[[str], Path], place: dict[str, str]
) -> None:
    calls = squeue("echo 77 2030-07-02T03:04:05")
    with Preemption(environment=dict(os.environ) | JOB | place, clock=lambda: 1.9e9):
        pass
    assert not calls.exists()


@pytest.mark.parametrize("body", ["echo 77 Unknown", "echo 77 N/A", "exit 1", "echo 77 2001-01-01T00:00:00", "echo"])
def test_a_job_without_an_end_has_none(squeue: Callable[[str], Path], body: str) -> None:
    calls = squeue(body)
    with Preemption(environment=dict(os.environ) | JOB) as preemption:
        assert preemption.seconds_to_end() is None and preemption.requested() is None
    assert calls.exists()


def test_a_controller_that_does_not_answer_costs_a_short_time_and_a_warning(
    squeue: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.preemption.SQUEUE_WITHIN_S", 0.2)
    squeue("exec sleep 60")
    started = time.monotonic()
    with Preemption(environment=dict(os.environ) | JOB) as preemption:
        assert preemption.seconds_to_end() is None
    assert time.monotonic() - started < 30
    assert "the end of job 77 is not known" in caplog.text


def test_without_the_command_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert ask_slurm({"PATH": "/nowhere", **JOB}, now=0.0) is None
    assert caplog.text == ""


# ---- other processes of the run


def test_programs_that_the_run_starts_do_not_see_the_signals_of_the_cluster() -> None:
    with Preemption(environment={}):
        program = subprocess.Popen(["sleep", "60"])
        for number in FROM_CLUSTER:
            program.send_signal(number)
        time.sleep(0.2)
        assert program.poll() is None
        program.kill()
        assert program.wait() == -signal.SIGKILL
    assert not set(FROM_CLUSTER) & signal.pthread_sigmask(signal.SIG_BLOCK, ())


AS_PROGRAM = """
import os, signal, time
from training.preemption import Preemption, hold_signals
hold_signals()
os.kill(os.getpid(), signal.SIGTERM)
with Preemption(environment={}) as preemption:
    while not preemption.requested():
        time.sleep(0.01)
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGUSR2)
raise SystemExit(75)
"""


def test_a_signal_before_the_program_listens_is_a_request_and_one_after_leaves_the_exit_code() -> None:
    assert subprocess.run([sys.executable, "-c", AS_PROGRAM], cwd=REPOSITORY, timeout=60).returncode == 75


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


@pytest.mark.slow
def test_a_real_slurm_says_when_the_job_ends(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    asks = "from training.preemption import ask_slurm; import os, time; print(ask_slurm(os.environ, time.time()))"
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/bash\nsrun --ntasks=2 {sys.executable} -c "{asks}"\n')
    where = (f"--chdir={REPOSITORY}", f"--output={tmp_path}/out", "--nodes=2", "--ntasks=2", "--time=30")
    submitted = time.time()
    job = slurm_cluster.submit(script, *where)
    slurm_cluster.wait_end(job)
    poll(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text().count("None") >= 1, 120, "an answer")
    answers = (tmp_path / "out").read_text().split()
    ends = [float(answer) for answer in answers if answer != "None"]
    assert ends, answers
    assert all(submitted + 1700 < end < time.time() + 1900 for end in ends), (submitted, answers)
