"""Fixtures of all rooms: a quiet environment, an S3 server, shards, a two-node Slurm; and tests that run alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

# Ranks, loader workers and servers share few cores; set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.helpers import slurm
from tests.helpers.s3 import S3Server, serve_s3, without_aws_account
from tests.helpers.shards import write_shards
from tests.helpers.turnstile import turn


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` has the machine for itself, its fixtures included, where workers run tests at once."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    # Each worker has a folder in that of the session.
    with turn(Path(item.config.getoption("basetemp")).parent, alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reaches an account, a tracker or a hub of the developer's; programs of this venv are on the PATH."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [key for key in os.environ if key.startswith(("AWS_", "WANDB_", "SLURM_", "CLIPYARD_END"))]:
            patch.delenv(name)
        settings = {
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            **without_aws_account(tmp_path_factory.mktemp("aws")),
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3_server(quiet_environment: None) -> Iterator[S3Server]:
    """An S3 server with an empty bucket; the environment's credentials and AWS_ENDPOINT_URL point to it.

    One server serves the whole session: choose keys of your own (`s3_server.upload(path, "my-test/a.tar")`).
    """
    with serve_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """`shards(counts, **options)`: `tests.helpers.shards.write_shards` into this test's folder."""
    return lambda counts, **options: write_shards(tmp_path / "shards", counts, **options)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[slurm.SlurmCluster]:
    """Two Slurm nodes on this machine; skips, with the reason, where that is not possible."""
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.two_nodes() as cluster:
        yield cluster
