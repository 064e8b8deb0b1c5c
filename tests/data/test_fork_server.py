from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

import data.worker
from data.fork_server import server_pid
from tests.data.test_loader import Shards, build, config_of, equal
from tests.helpers.process import Running, environment, poll

TRAINER = """
import os, sys, time
from tests.data.test_loader import build, config_of

if __name__ == "__main__":
    loader = build(config_of(sys.argv[3:], workers=int(sys.argv[2]), batch_size=4, resampled=True))
    print("first", len(next(loader).keys), flush=True)
    os.close(os.open(sys.argv[1], os.O_CREAT))
    while True:
        next(loader)
        time.sleep(0.01)
"""


class WhereFrom:
    """A tokenizer that tells which file the worker's code is from."""

    def __call__(self, captions: list[str]):  # type: ignore[no-untyped-def]
        import torch

        here = Path(data.worker.__file__).resolve() == Path(os.environ["CLIPYARD_TEST_WORKER"])
        return torch.full((len(captions), 1), int(here))


def test_a_fork_server_of_somebody_else_may_go(shards: Shards) -> None:
    forkserver.ensure_running()
    theirs = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    config = config_of(shards([30]), sizes=(30,), workers=2)
    with build(config) as there, build(dataclasses.replace(config, workers=0)) as here:
        assert equal(next(there), next(here))
        assert server_pid() != theirs
        os.kill(theirs, signal.SIGTERM)
        os.waitid(os.P_PID, theirs, os.WEXITED | os.WNOWAIT)
        for _ in range(8):
            assert equal(next(there), next(here))


def test_workers_run_the_code_of_their_trainer(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.background import PER_PROCESS
    from data.loader import build_train_loader

    other = tmp_path / "data"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "worker.py").write_text("Worker = None")
    monkeypatch.setenv("CLIPYARD_TEST_WORKER", str(Path(data.worker.__file__).resolve()))
    config = config_of(shards([8]), workers=1, batch_size=4)
    monkeypatch.chdir(tmp_path)  # where a server would look first for what it is told to import
    PER_PROCESS.drop("fork server")
    with build_train_loader(config, WhereFrom(), 0, 1) as loader:
        assert next(loader).tokens.all()


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True], ids=["alone", "with-its-group"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_trainer_leaves_nothing(shards: Shards, tmp_path: Path, workers: int, group: bool) -> None:
    """Neither processes, some in the middle of a read that never ends, nor names of shared memory, nor files."""
    scratch = Path(tempfile.mkdtemp(prefix="cy-"))  # paths of sockets are short
    flag = tmp_path / "stall"
    urls = [f"pipe:cat {path}; if [ -e {flag} ]; then sleep 3600; fi" for path in shards([40] * 6)]
    mark = {"CLIPYARD_TEST_MARK": str(tmp_path), "TMPDIR": str(scratch)}
    with Running([sys.executable, "-c", TRAINER, str(flag), str(workers), *urls], env=mark) as trainer:
        trainer.wait_for("first 4", 20)
        poll(lambda: b"sleep" in b"".join(_marked(tmp_path).values()), 30, "the endless read", trainer)
        names = _shared_names(list(_marked(tmp_path)))
        trainer.signal(signal.SIGKILL, group=group)
        poll(lambda: not _marked(tmp_path), 20, f"end of {_marked(tmp_path)}")
    assert not [name for name in names if os.path.exists(name)]
    assert not list(scratch.rglob("*"))
    scratch.rmdir()


def _marked(mark: Path) -> dict[int, bytes]:
    """Command lines of the running processes whose environment holds `mark`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"CLIPYARD_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue
    return found


def _shared_names(pids: list[int]) -> set[str]:
    """The files under /dev/shm that these processes have mapped."""
    names: set[str] = set()
    for pid in pids:
        try:
            names |= set(re.findall(r"/dev/shm/\S+$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE))
        except OSError:  # a passing one (a compiler's, say) has ended since it was listed
            continue
    return names


def test_a_long_path_for_temporary_files_is_no_obstacle(shards: Shards, tmp_path: Path) -> None:
    long = tmp_path / ("job-" + "0" * 80)
    long.mkdir()
    urls = [str(path) for path in shards([4] * 2)]
    program = TRAINER.replace("os.close(os.open(sys.argv[1], os.O_CREAT))", "sys.exit(loader.close())")
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "flag"), "1", *urls],
        env=environment({"TMPDIR": str(long)}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
