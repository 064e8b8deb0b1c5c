from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.process import environment, poll

READER = """
import os, signal, sys
from data.pipe import Command

left = [Command("pipe:sleep 3600 | cat"), Command("pipe:sleep 3600; true"), Command("pipe:sleep 3600")]
left[1].close()
print(*(one._process.pid for one in left), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _is_running(pid: int) -> bool:
    status = Path("/proc", str(pid), "stat")
    return status.exists() and ") Z " not in status.read_text()


def test_commands_end_with_their_reader_however_it_ends() -> None:
    for how, code in (("killed", -signal.SIGKILL), ("leaves", 0)):
        command = [sys.executable, "-W", "ignore", "-c", READER, how]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30)
        assert done.returncode == code, done.stderr
        pids = list(map(int, done.stdout.split()))
        assert len(pids) == 3
        poll(lambda pids=pids: not any(map(_is_running, pids)), 5, "end of the commands")


def test_a_killed_guard_is_no_fault(tmp_path: Path) -> None:
    script = """
import os, signal
from data.storage import open_stream
from data.pipe import _start_guard
from data.background import PER_PROCESS
read, write = os.pipe()
os.close(read)
PER_PROCESS.get("pipe guard", lambda: write)
print(open_stream("pipe:echo fine").read(4))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment(), capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"b'fine'\n"), done.stderr
    assert not os.listdir(tmp_path)
