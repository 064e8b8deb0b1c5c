"""The end of a process: its exit code is the one it was given, though a thread is in C++ at that moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.process import ROOT

# A thread that is nearly always in a request to a store, as the watch over the ranks is now and then.
BUSY = """
import atexit, os, runpy, sys, threading
from datetime import timedelta
import torch.distributed as dist
from training.leave import leave

store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
begun = threading.Event()

def ask():
    while True:
        try:
            store.wait(["nothing"], timedelta(milliseconds=20))
        except Exception:
            begun.set()

threading.Thread(target=ask, daemon=True).start()
begun.wait()
"""


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUSY + program, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_code_and_what_was_printed_survive() -> None:
    done = run("atexit.register(print, 'closed')\nprint('no newline at the end', end=' ')\nleave(75)")
    assert done.returncode == 75, done.stderr
    assert done.stdout == "no newline at the end closed\n"
    assert "terminate called" not in done.stderr


def test_a_stream_that_nobody_reads_any_more_does_not_change_the_code() -> None:
    closed = "r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)"
    done = run(f"{closed}\nsys.stdout = open(1, 'w', closefd=False)\nprint('unread')\nleave(75)")
    assert done.returncode == 75, done.stderr


def test_a_table_that_a_full_disk_has_swallowed_is_no_success() -> None:
    done = run("sys.stdout = open('/dev/full', 'w')\nprint('a table')\nleave(0)")
    assert done.returncode == 1
    assert "error: stdout cannot be written: No space left on device" in done.stderr


def test_closed_streams_are_no_matter() -> None:
    done = run("sys.stdout = sys.stderr = None\nleave(75)")
    assert done.returncode == 75, done.stderr


def test_an_exit_hook_that_fails_is_told_and_does_not_change_the_code() -> None:
    done = run("atexit.register(lambda: 1 / 0)\nleave(75)")
    assert done.returncode == 75, done.stderr
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("training.main", "--model no-such --dataset-type synthetic --train-num-samples 8"),
        ("scripts.evaluate", "--checkpoint no-such.safetensors --model no-such --val-data no-such.tar"),
        ("scripts.watch_evaluate", "no-such --once --val-data no-such.tar --val-num-samples 1"),
        ("scripts.average_checkpoints", "no-such out"),
        ("scripts.report_run", "no-such --device cpu"),
    ],
)
def test_programs_with_process_groups_leave_by_it(module: str, flags: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    words = [str(path) if word == "out" else word for word in flags.split()]
    program = f"sys.argv[0] = {module!r}\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = run(program, *words)
    assert done.returncode in (1, 2), done.stderr
    assert "error: " in done.stdout + done.stderr
    assert "terminate called" not in done.stderr
