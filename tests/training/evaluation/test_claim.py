from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from training.errors import ConfigError, FolderError
from training.evaluation.claim import FILE_NAME, Claim


def leave_behind(folder: Path, host: str = "another-host", pid: int = 1) -> Path:
    """The file of a holder that does not touch it any more."""
    path = folder / FILE_NAME
    path.write_text(json.dumps({"host": host, "pid": pid, "token": "theirs"}))
    return path


def ended_process() -> int:
    """The number of a process that no longer is."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_is_given_back_and_may_be_had_again(tmp_path: Path) -> None:
    for _ in range(2):
        with Claim(tmp_path) as claim:
            claim.check()
            assert claim.path.exists()
        assert list(tmp_path.iterdir()) == []


def test_a_second_one_is_refused_at_the_firsts_sign_of_life(tmp_path: Path) -> None:
    path = leave_behind(tmp_path)
    stop = time.monotonic() + 30

    def beat() -> None:
        while path.exists() and time.monotonic() < stop:
            os.utime(path)
            time.sleep(0.02)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ConfigError, match=r"process 1 on another-host evaluates this run already"), Claim(tmp_path):
        pass
    assert json.loads(path.read_text())["token"] == "theirs"
    path.unlink()
    thread.join()


def test_the_holder_gives_signs_of_life(tmp_path: Path) -> None:
    with Claim(tmp_path, beat_s=0.05) as claim:
        first = claim.path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while claim.path.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_silent_holder_on_another_host_is_replaced_after_a_while(tmp_path: Path) -> None:
    leave_behind(tmp_path)
    began = time.monotonic()
    with Claim(tmp_path, beat_s=0.1, silent_s=0.5) as claim:
        claim.check()
        assert time.monotonic() - began >= 0.5


def test_a_holder_that_was_killed_on_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    leave_behind(tmp_path, socket.gethostname(), ended_process())
    with Claim(tmp_path, silent_s=1e6) as claim:
        claim.check()


def test_who_was_taken_for_dead_and_is_not_writes_no_more_and_leaves_the_other_alone(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim:
        claim.path.unlink()
        path = leave_behind(tmp_path)
        with pytest.raises(FolderError, match="no longer this process's: process 1 on another-host"):
            claim.check()
    assert path.exists()


def test_a_file_that_is_being_written_is_somebodys(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    with Claim(tmp_path, beat_s=0.1, silent_s=0.2) as claim:
        claim.check()


def test_a_folder_that_cannot_be_written_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"cannot be written: Not a directory; --output names another folder"),
        Claim(tmp_path / "file" / "folder"),
    ):
        pass
