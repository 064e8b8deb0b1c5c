from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.background import PER_PROCESS
from data.errors import StorageError
from data.storage import ByteStream, Retry, open_stream, probe
from tests.data.faulty_server import FaultyServer, serve
from tests.helpers.s3 import S3Server

CONTENT = bytes(os.urandom(1 << 10)) * 300 + b"the end"
QUICK = Retry(attempts=4, first_s=0.001, longest_s=0.01)
Opener = Callable[..., ByteStream]


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyServer]:
    forget_s3_clients()
    with serve() as server:
        yield server
    forget_s3_clients()


@pytest.fixture
def server(running: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    running.objects = {"/bucket/a.tar": CONTENT, "/bucket/empty": b""}
    running.faults, running.always, running.ranges, running.requests = [], ("ok", None), True, []
    for name, value in {
        "AWS_ENDPOINT_URL": running.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return running


def forget_s3_clients() -> None:
    """A client keeps the endpoint and the credentials with which it was made."""
    PER_PROCESS.drop_all("s3")


@pytest.fixture(params=["local", "http", "http-without-ranges", "s3", "memory", "pipe"])
def url(request: pytest.FixtureRequest, server: FaultyServer, tmp_path: Path) -> str:
    """The same content by every way."""
    kind = request.param
    if kind in ("local", "pipe"):
        path = tmp_path / "a.tar"
        path.write_bytes(CONTENT)
        return str(path) if kind == "local" else f"pipe:cat {path}"
    if kind == "memory":
        import fsspec

        fsspec.filesystem("memory").pipe_file("/bucket/a.tar", CONTENT)
        return "memory://bucket/a.tar"
    server.ranges = kind != "http-without-ranges"
    return "s3://bucket/a.tar" if kind == "s3" else f"{server.url}/bucket/a.tar"


def read_all(url: str, size: int = 50_000, **options: int) -> bytes:
    parts = []
    with open_stream(url, retry=QUICK, **{"chunk_bytes": 1 << 16, **options}) as stream:
        while part := stream.read(size):
            parts.append(part)
        assert stream.position == options.get("offset", 0) + sum(map(len, parts))
    return b"".join(parts)


def test_every_way_gives_the_same_bytes(url: str) -> None:
    assert read_all(url) == CONTENT
    assert read_all(url, offset=123_456) == CONTENT[123_456:]
    assert read_all(url, size=7 * len(CONTENT)) == CONTENT


def test_reads_and_skips_in_any_sizes_add_up(url: str) -> None:
    for read_ahead in (0, 2):
        with open_stream(url, retry=QUICK, chunk_bytes=10_000, read_ahead=read_ahead) as stream:
            assert stream.read(10) == CONTENT[:10]
            assert stream.skip(25_000) == 25_000
            assert stream.read(5) == CONTENT[25_010:25_015]
            assert stream.skip(0) == 0
            assert stream.skip(150_000) == 150_000
            assert stream.position == 175_015
            assert stream.read(30_000) == CONTENT[175_015:205_015]
            assert stream.skip(10**7) == len(CONTENT) - 205_015
            assert stream.read(1) == b""


def test_nothing_is_read_beyond_the_end(url: str) -> None:
    assert read_all(url, offset=len(CONTENT)) == b""


def test_an_empty_object_is_no_error(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for url in (str(tmp_path / "empty"), f"{server.url}/bucket/empty", "s3://bucket/empty", "pipe:true"):
        assert read_all(url) == b""


@pytest.fixture(params=["http", "http-without-ranges", "s3"])
def remote(request: pytest.FixtureRequest, server: FaultyServer) -> str:
    server.ranges = request.param != "http-without-ranges"
    return "s3://bucket/a.tar" if request.param == "s3" else f"{server.url}/bucket/a.tar"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["reset", "short"]), st.integers(0, 70_000)),
            st.tuples(st.just("status"), st.sampled_from([500, 503, 429])),
            st.just(("ok", None)),
        ),
        max_size=3,
    )
)
def test_passing_faults_leave_no_trace(remote: str, server: FaultyServer, faults: list[tuple[str, int]]) -> None:
    server.faults = list(faults)
    assert read_all(remote, chunk_bytes=1 << 16) == CONTENT


def test_a_broken_range_goes_on_at_the_byte_where_it_broke(server: FaultyServer) -> None:
    server.faults = [("short", 300_000), ("short", 1000)]  # a reset may take with it what the kernel held
    server.objects["/bucket/a.tar"] = long = os.urandom(1 << 20)
    assert read_all("s3://bucket/a.tar", chunk_bytes=1 << 20) == long
    starts = [int(asked.removeprefix("bytes=").split("-")[0]) for _, asked in server.requests if asked]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert 200_000 < starts[1] <= 300_000  # what had arrived, but for the last piece, is not asked for again


def test_a_503_that_stays_is_given_up_and_named(remote: str, server: FaultyServer) -> None:
    server.always = ("status", 503)
    with pytest.raises(StorageError, match=r"503|SlowDown") as caught:
        read_all(remote)
    assert caught.value.kind == "unreachable"
    assert len(server.requests) == QUICK.attempts


def test_a_missing_object_is_not_asked_for_twice(server: FaultyServer) -> None:
    for url in ("s3://bucket/none.tar", f"{server.url}/bucket/none.tar"):
        server.requests.clear()
        with pytest.raises(StorageError, match="no such") as caught:
            read_all(url)
        assert caught.value.kind == "missing"
        assert len(server.requests) == 1


def test_an_expired_token_gets_a_new_client(server: FaultyServer) -> None:
    assert read_all("s3://bucket/a.tar") == CONTENT
    before = PER_PROCESS.get(("s3", False, QUICK.silence_s), lambda: None)
    server.faults = [("ok", None), ("s3", (400, "ExpiredToken"))]
    assert read_all("s3://bucket/a.tar") == CONTENT
    assert PER_PROCESS.get(("s3", False, QUICK.silence_s), lambda: None) is not before


def test_an_object_that_changes_while_it_is_read_is_noticed(server: FaultyServer) -> None:
    server.faults = [("ok", None), ("s3", (412, "PreconditionFailed"))]
    with pytest.raises(StorageError, match="changed"):
        read_all("s3://bucket/a.tar", read_ahead=0)


@pytest.mark.parametrize(
    ("url", "kind", "reason"),
    [
        ("s3://bucket/none.tar", "missing", "no such object"),
        ("none/none.tar", "missing", "No such file"),
        ("pipe:echo cannot find it: 404 >&2; exit 3", "missing", "code 3: cannot find it: 404"),
        ("pipe:nocommand", "missing", "not found"),
        ("nosuch://a/b.tar", "unreadable", "nosuch"),
        ("http://127.0.0.1:9/a.tar", "unreachable", "refused"),
    ],
)
def test_a_probe_says_why_within_seconds(server: FaultyServer, url: str, kind: str, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match=reason) as caught:
        probe(url)
    assert caught.value.kind == kind
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((404, "NoSuchBucket"), "no such bucket: bucket"),
        ((403, "AccessDenied"), "no permission"),
        ((403, "InvalidAccessKeyId"), "InvalidAccessKeyId"),
    ],
)
def test_a_probe_explains_what_s3_answers(server: FaultyServer, answer: tuple[int, str], reason: str) -> None:
    server.always = ("s3", answer)
    with pytest.raises(StorageError, match=reason):
        probe("s3://bucket/a.tar")


def test_a_refused_connection_to_s3_is_tried_again(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_s3_clients()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    attempts: list[int] = []
    monkeypatch.setattr(Retry, "pause", lambda _, attempt: attempts.append(attempt))
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9") as caught:
        read_all("s3://bucket/a.tar")
    assert caught.value.kind == "unreachable"
    assert attempts == [1, 2, 3]
    forget_s3_clients()


def test_a_profile_that_does_not_exist_is_named(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_s3_clients()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"\(nobody\) could not be found \(AWS_PROFILE\)") as caught:
        read_all("s3://bucket/a.tar")
    assert caught.value.kind == "denied"
    forget_s3_clients()


@pytest.mark.parametrize(
    ("settings", "header", "value"),
    [
        ({"requester_pays": True}, "x-amz-request-payer", "requester"),
        ({"requester_pays": "true", "anon": "false"}, "x-amz-request-payer", "requester"),
        ({"anon": "true"}, "Authorization", None),
        ({"config_kwargs": {"user_agent_extra": "house"}}, "User-Agent", "house"),
    ],
)
def test_fsspec_settings_for_s3_count(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], header: str, value: str | None
) -> None:
    from fsspec.config import conf

    forget_s3_clients()
    monkeypatch.setitem(conf, "s3", settings)
    assert read_all("s3://bucket/a.tar") == CONTENT
    sent = server.headers[-1]
    assert value in (sent[header] or "") if value else header not in sent
    forget_s3_clients()


def test_a_server_that_gives_no_ranges_later_on_is_read_in_one_go(server: FaultyServer) -> None:
    def no_more_ranges() -> None:
        server.ranges = False

    url = f"{server.url}/bucket/a.tar"
    with open_stream(url, retry=QUICK, chunk_bytes=10_000, read_ahead=4) as stream:
        assert stream.read(10) == CONTENT[:10]
        no_more_ranges()
        assert stream.read(10**7) == CONTENT[10:]


def test_a_silent_command_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    retry = Retry(attempts=2, first_s=0.001, silence_s=0.02)
    with (
        pytest.raises(StorageError, match=r"wrote nothing for 0\.2 s") as caught,
        open_stream("pipe:echo data; sleep 600", retry=retry) as stream,
    ):
        stream.read(100)
    assert caught.value.kind == "unreachable"
    assert time.monotonic() - began < 5


def test_a_command_that_gives_less_when_run_again_is_a_failure(tmp_path: Path) -> None:
    flag = tmp_path / "broke"
    command = f"if [ -e {flag} ]; then echo less; else touch {flag}; echo more than that; exit 1; fi"
    with pytest.raises(StorageError, match="gave 5 bytes where it had given 15 before"):
        read_all(f"pipe:{command}")


def test_without_credentials_a_public_bucket_still_works(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_s3_clients()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert read_all("s3://bucket/a.tar") == CONTENT
    server.always = ("s3", (403, "AccessDenied"))
    with pytest.raises(StorageError, match="no AWS credentials found"):
        probe("s3://bucket/a.tar")
    forget_s3_clients()


def test_s3_over_http_against_another_implementation(s3_server: S3Server) -> None:
    forget_s3_clients()
    url = s3_server.upload(CONTENT, "storage/a.tar")
    assert read_all(url, offset=100) == CONTENT[100:]
    for missing in (url + "x", "s3://no-such-bucket-at-all/a.tar"):
        with pytest.raises(StorageError, match="no such"):
            probe(missing)
    forget_s3_clients()


def test_a_pipe_that_fails_at_its_end_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="code 4: it broke"):
        read_all("pipe:echo data; echo it broke >&2; exit 4")
    with pytest.raises(StorageError, match="code 5"):
        read_all("pipe:(echo data; exit 5) | cat")


def test_a_pipe_that_breaks_once_runs_again_and_skips_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    flag = tmp_path / "broke"
    command = f"if [ -e {flag} ]; then cat {tmp_path}/a; else touch {flag}; head -c 100001 {tmp_path}/a; exit 1; fi"
    assert read_all(f"pipe:{command}") == CONTENT


def test_leaving_a_pipe_early_is_silent_and_ends_its_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pid = tmp_path / "pid"
    with open_stream(f"pipe:(echo $BASHPID > {pid}; yes) | cat") as stream:
        assert stream.read(4) == b"y\ny\n"
        assert stream.skip(1000) == 1000
    assert capfd.readouterr().err == ""
    time.sleep(0.05)
    status = Path("/proc", pid.read_text().strip(), "stat")
    assert not status.exists() or ") Z " in status.read_text()


def test_a_head_in_a_pipeline_is_no_failure() -> None:
    assert read_all("pipe:yes | head -c 1000") == b"y\n" * 500


def test_messages_do_not_show_secrets() -> None:
    with pytest.raises(StorageError) as caught:
        probe("http://user:geheim@127.0.0.1:9/a.tar?X-Amz-Signature=geheim")
    assert "geheim" not in str(caught.value)
