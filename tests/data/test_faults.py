"""Whole epochs through the loader from a real S3 server that fails, against the epochs that it should have given."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.cached import SimpleCacheFileSystem
from s3fs import S3FileSystem

from data.background import PER_PROCESS
from data.batch import Position
from data.config import LoaderConfig
from data.errors import DataError
from data.loader import TrainLoader, run_preflight
from data.preflight import check_storage
from data.stream import Retry
from data.urls import Source, expand_sources
from tests.data.test_loader import Numbers, build
from tests.helpers.faulty_proxy import Fault, FaultyProxy, faulty_proxy, seeded
from tests.helpers.process import run_training
from tests.helpers.s3 import S3Server, serve_s3
from tests.helpers.shards import make_sample

NUM_SHARDS, PER_SHARD = 6, 12
SAMPLES = range(NUM_SHARDS * PER_SHARD)
BROKEN = ("reset", "short", "slow_down", "hang_up")
QUICK = Retry(attempts=8, first_s=0.001, longest_s=0.02, silence_s=0.5)


def _write_shard(number: int) -> bytes:
    """Twelve samples of some 50 KiB: a shard is a few ranges long."""
    filler, file = random.Random(number), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for index in range(number * PER_SHARD, (number + 1) * PER_SHARD):
            for extension, content in {**make_sample(index, image_size=16), "bin": filler.randbytes(50_000)}.items():
                member = tarfile.TarInfo(f"{index:08d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def running(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """Before a server of these tests' own, with the credentials of the environment: what they do to it is theirs."""
    with serve_s3() as server:
        for number in range(NUM_SHARDS):
            key = f"faults/{number}.tar"
            server.upload(_write_shard(number), key)
            server.client().put_object_acl(Bucket=server.bucket, Key=key, ACL="public-read")  # for plain HTTP
        with faulty_proxy(server.endpoint_url) as proxy:
            yield proxy


@pytest.fixture
def proxy(running: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    running.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
    _forget_clients()
    yield running
    _forget_clients()


def _forget_clients() -> None:
    """Ours and fsspec's: both keep the address that the environment named when they were made."""
    PER_PROCESS.drop_all("s3")
    for system in (S3FileSystem, SimpleCacheFileSystem):
        system.clear_instance_cache()


def config_of(form: str, **changes: object) -> LoaderConfig:
    """Six shards by `form`, whose {} is bucket and key."""
    urls = tuple(form.format(f"clipyard-test/faults/{number}.tar") for number in range(NUM_SHARDS))
    sizes = (PER_SHARD,) * NUM_SHARDS
    config = LoaderConfig(
        sources=(Source("set", urls),), batch_size=12, image_size=(8, 8), sizes=sizes, shuffle_budget_mib=1, retry=QUICK
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def numbers(loader: TrainLoader, count: int) -> Counter[int]:
    """The samples of the next `count` batches."""
    return Counter(int(number) for _ in range(count) for number in next(loader).tokens[:, 0])


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 24))])
def test_an_epoch_over_s3_in_spite_of_faults_is_every_sample_once(proxy: FaultyProxy, seed: int) -> None:
    proxy.schedule = seeded(seed, kinds=BROKEN)
    with build(config_of("s3://{}")) as loader:
        assert numbers(loader, 6) == dict.fromkeys(SAMPLES, 1)
        assert not loader.stats().failed_shards
    assert proxy.spent


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["s3://{}", "http://{proxy}/{}", "simplecache::s3://{}"])
def test_an_epoch_by_every_way_is_every_sample_once(
    proxy: FaultyProxy, form: str, workers: int, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # fsspec's S3 has retries of its own and waits a minute for a silent server, whatever we ask. Its cache takes a
    # body that ends early for a whole file, which then is a shard cut short.
    chained = tuple(kind for kind in BROKEN if kind != "short")
    proxy.schedule = seeded(seed, 0.5, chained) if "::" in form else seeded(seed, 0.15)
    form = form.replace("{proxy}", proxy.url.removeprefix("http://"))
    with build(config_of(form, workers=workers)) as loader:
        assert numbers(loader, 6) == dict.fromkeys(SAMPLES, 1)
        assert not loader.stats().failed_shards
        assert numbers(loader, 6) == dict.fromkeys(SAMPLES, 1)
    assert proxy.spent


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_by_a_command_in_spite_of_faults_is_every_sample_once(proxy: FaultyProxy, workers: int) -> None:
    # Not "short": after a body that ends early the AWS CLI sends the object's beginning again, and ends with code 0.
    kinds = ("reset", "slow_down")
    proxy.schedule = lambda number, path: Fault(kinds[number // 3 % 2], 100_000) if number % 3 == 2 else Fault()
    with build(config_of("pipe:aws s3 cp s3://{} -", workers=workers, batch_size=2)) as loader:
        seen = numbers(loader, len(SAMPLES) // 2)
        assert not loader.stats().examples
        assert seen == dict.fromkeys(SAMPLES, 1)
    assert proxy.spent


@pytest.mark.slow
def test_what_a_command_garbles_is_counted_and_named(proxy: FaultyProxy) -> None:
    proxy.schedule = lambda number, path: Fault("short", 100_001) if path.endswith("3.tar") else Fault()
    with build(config_of("pipe:aws s3 cp s3://{} -", batch_size=1, max_skip_fraction=0.5)) as loader:
        seen = numbers(loader, len(SAMPLES) - PER_SHARD)
        assert loader.stats().failed_shards.total() == 1
        assert "faults/3.tar" in next(iter(loader.stats().examples.values()))
    assert max(seen.values()) == 1


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        (Fault("missing"), "missing", "no such object"),
        (Fault("wall", 300_000), "unreachable", "ended .* early .gave up at byte 300000"),
    ],
)
def test_what_cannot_be_read_is_counted_and_named(
    proxy: FaultyProxy, workers: int, fault: Fault, kind: str, reason: str
) -> None:
    proxy.schedule = seeded(5, kinds=("reset", "short", "slow_down"))
    proxy.always["3.tar"] = fault
    config = config_of("s3://{}", workers=workers, batch_size=1, max_skip_fraction=0.5)
    lost = set(range(3 * PER_SHARD, 4 * PER_SHARD))
    with build(config) as loader:
        seen = numbers(loader, len(SAMPLES) - PER_SHARD)
        failed, examples = Counter(loader.stats().failed_shards), dict(loader.stats().examples)
    assert failed == {kind: 1}
    assert "faults/3.tar" in examples[f"shard {kind}"]
    assert re.search(reason, examples[f"shard {kind}"])
    assert max(seen.values()) == 1
    assert len(set(SAMPLES) - lost - set(seen)) == len(set(seen) & lost)  # what came before the wall


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3))])
def test_a_resume_in_the_middle_of_faults_neither_repeats_nor_loses(proxy: FaultyProxy, seed: int) -> None:
    proxy.schedule = seeded(seed, kinds=BROKEN)
    config = config_of("s3://{}", batch_size=8)
    steps = 1 + seed * 2
    with build(config) as loader:
        before = numbers(loader, steps)
        position = Position.from_json(loader.position().to_json())
        numbers(loader, 2)
    with build(config, position=position) as resumed:
        assert before + numbers(resumed, 9 - steps) == dict.fromkeys(SAMPLES, 1)


def test_short_lived_credentials_are_read_again(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "cluster")
    seen = {"first": 0, "second": 0}

    def renew(token: str) -> None:
        file.write_text(f"[cluster]\naws_access_key_id=a\naws_secret_access_key=b\naws_session_token={token}\n")

    def schedule(number: int, path: str) -> Fault:
        seen[proxy.token or ""] += 1
        if number == 5:
            proxy.token = "second"
        if number == 9:  # three requests met the old token before the file changed
            renew("second")
        return Fault()

    renew("first")
    proxy.token, proxy.schedule = "first", schedule
    with build(config_of("s3://{}")) as loader:
        assert numbers(loader, 6) == dict.fromkeys(SAMPLES, 1)
        assert not loader.stats().failed_shards
    assert seen["second"] > 4


def test_a_server_that_is_away_for_a_while_is_waited_for(proxy: FaultyProxy) -> None:
    patient = dataclasses.replace(QUICK, first_s=0.05, longest_s=0.2)
    with build(config_of("s3://{}", retry=patient)) as loader:
        first = numbers(loader, 1)
        proxy.refuse(0.4)
        assert first + numbers(loader, 5) == dict.fromkeys(SAMPLES, 1)
        assert not loader.stats().failed_shards


@pytest.mark.parametrize("kind", ["trickle", "stall"])
def test_what_stands_still_is_asked_for_again(proxy: FaultyProxy, kind: str) -> None:
    struck: set[str] = set()

    def schedule(number: int, path: str) -> Fault:
        fault = Fault(kind, 1000) if path[-5] in "24" and path not in struck else Fault()
        struck.add(path)
        return fault

    proxy.schedule = schedule
    with build(config_of("s3://{}")) as loader:
        assert numbers(loader, 6) == dict.fromkeys(SAMPLES, 1)
        assert not loader.stats().failed_shards
    assert [fault.kind for fault in proxy.spent] == [kind, kind]


@pytest.mark.alone
@pytest.mark.parametrize(
    "fault",
    [Fault("short", 1), *(pytest.param(Fault(kind, 1), marks=pytest.mark.slow) for kind in ("trickle", "stall"))],
)
def test_a_shard_that_never_comes_ends_within_a_bound(proxy: FaultyProxy, fault: Fault) -> None:
    proxy.always["2.tar"] = fault
    retry = dataclasses.replace(QUICK, attempts=4, silence_s=0.2)
    began = time.monotonic()
    with build(config_of("s3://{}", batch_size=1, max_skip_fraction=0.5, retry=retry)) as loader:
        seen = numbers(loader, len(SAMPLES) - PER_SHARD)
        assert loader.stats().failed_shards == {"unreachable": 1}
    assert set(seen) == set(SAMPLES) - set(range(2 * PER_SHARD, 3 * PER_SHARD))
    assert time.monotonic() - began < 4


@pytest.mark.slow
def test_leaving_in_the_middle_of_faults_is_silent(proxy: FaultyProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.schedule = seeded(3, 0.5)
    with build(config_of("s3://{}", workers=1)) as loader:
        next(loader)
    assert capfd.readouterr() == ("", "")
    assert os.environ["AWS_ENDPOINT_URL"] == proxy.url


@pytest.mark.alone
def test_frozen_storage_is_named_at_the_start(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.schedule = lambda number, path: Fault("stall")
    short = Retry(attempts=2, first_s=0.001, silence_s=0.3)
    monkeypatch.setattr("data.storage.PROBE", short)
    monkeypatch.setattr("data.loader.PROBE", short)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"s3://clipyard-test/faults/0.tar: Read timeout .*gave up") as caught:
        check_storage(expand_sources("s3://clipyard-test/faults/{0..5}.tar"))
    assert caught.value.exit_code == 1
    with pytest.raises(DataError, match="none of 3 shards looked at can be read") as caught:
        run_preflight(config_of("s3://{}"), Numbers())
    assert caught.value.exit_code == 1
    assert time.monotonic() - began < 4
    proxy.schedule = lambda number, path: Fault("missing" if path.endswith("0.tar") else "ok")
    # One shard that is missing is for the preflight to judge.
    check_storage(expand_sources("s3://clipyard-test/faults/{0..5}.tar"))


@pytest.mark.slow
def test_training_on_frozen_storage_ends_within_seconds(proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.schedule = lambda number, path: Fault("stall")
    began = time.monotonic()
    arguments = ["--train-data", "s3://clipyard-test/faults/{0..5}.tar", "--model", "RN50", "--logs", tmp_path]
    run = run_training(*arguments, "--train-num-samples", "72", "--batch-size", "4", "--dataset-resampled").expect(1)
    assert "s3://clipyard-test/faults/0.tar: Read timeout" in run.output
    assert "Traceback" not in run.output
    assert time.monotonic() - began < 30
