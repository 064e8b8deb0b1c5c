"""A run's folder at a remote: on a local disk, in memory, and on an S3 server over HTTP."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from models import create_model, load_pretrained
from tests.helpers.s3 import S3Server
from training import remote as remote_module
from training.checkpoint_files import list_checkpoints, verify_checkpoint, write_checkpoint
from training.errors import EXIT_CONFIG, EXIT_FAILED, CheckpointError, ConfigError, RemoteError
from training.manifest import MANIFEST, read_manifest_text
from training.remote import Remote, Replaced, in_time, insist, open_remote, remote_checkpoint, run_remote

NAME = "step_000000007"
Write = Callable[..., Path]


@pytest.fixture(params=["file", "path", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that is empty, of each kind."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        return server.url(f"remote-{uuid.uuid4().hex}")
    places = {"file": f"file://{tmp_path}/away", "path": f"{tmp_path}/away", "memory": f"memory://{uuid.uuid4().hex}"}
    return places[request.param]


@pytest.fixture
def away(tmp_path: Path) -> Remote:
    """A remote on the local disk."""
    return Remote(f"{tmp_path}/away/run")


def upload(remote: Remote, folder: Path) -> int:
    text = read_manifest_text(folder)
    assert text is not None
    return remote.upload(folder, text)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- in and out


def test_what_was_uploaded_comes_back_byte_by_byte_and_verified(url: str, write_step: Write, tmp_path: Path) -> None:
    folder = write_step(NAME, 7)
    remote = open_remote(url, "run", tmp_path / "run")
    size = upload(remote, folder)
    assert size == sum(len(data) for name, data in content(folder).items() if name != MANIFEST)
    assert remote.manifests() == {NAME: read_manifest_text(folder)}
    fetched = run_remote(url, "run").fetch(NAME, tmp_path / "other")
    assert content(fetched) == content(folder) and verify_checkpoint(fetched).step == 7
    assert [path.name for path in (tmp_path / "other").iterdir()] == [NAME]


def test_a_few_files_of_a_checkpoint_are_fetched_without_the_rest_and_verified(
    away: Remote, write_step: Write, tmp_path: Path
) -> None:
    folder = write_step(NAME, 7)
    upload(away, folder)
    few = {"model.safetensors", "state.json"}
    fetched = away.fetch(NAME, tmp_path / "other", few)
    assert content(fetched) == {name: data for name, data in content(folder).items() if name in few | {MANIFEST}}
    there = tmp_path / "away" / "run" / "checkpoints" / NAME / "model.safetensors"
    there.write_bytes(bytes(byte ^ 1 for byte in there.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        away.fetch(NAME, tmp_path / "other", few)


def test_an_upload_replaces_what_has_its_name(url: str, write_step: Write, tmp_path: Path) -> None:
    remote = open_remote(url, "run", tmp_path / "run")
    upload(remote, write_step(NAME, 7))
    upload(remote, write_step(NAME, 8))
    assert verify_checkpoint(remote.fetch(NAME, tmp_path / "other")).step == 8


def test_a_discarded_checkpoint_leaves_nothing_and_its_neighbours_alone(
    url: str, write_step: Write, tmp_path: Path
) -> None:
    remote = open_remote(url, "run", tmp_path / "run")
    for name, step in ((NAME, 7), ("step_000000070", 70)):
        upload(remote, write_step(name, step))
    remote.discard(NAME)
    assert list(remote.manifests()) == ["step_000000070"]
    system, root = fsspec.core.url_to_fs(f"{url}/run")
    system.invalidate_cache()
    assert not [path for path in system.find(root) if NAME in path]
    remote.discard(NAME)  # a second time there is nothing to do


def test_small_files_lie_beside_the_checkpoints(url: str, tmp_path: Path) -> None:
    remote = open_remote(url, "run", tmp_path / "run")
    assert remote.read("metrics.jsonl") is None and remote.manifests() == {}
    for text in (b"one\n", b"one\ntwo\n"):
        remote.write("metrics.jsonl", text)
    assert run_remote(url, "run").read("metrics.jsonl") == b"one\ntwo\n"


def test_opening_leaves_no_object_behind(s3_server: S3Server, tmp_path: Path) -> None:
    open_remote(s3_server.url("opened"), "run", tmp_path / "run")
    assert s3_server.keys("opened") == []


def test_odd_names_of_runs_are_taken_as_they_are(url: str, write_step: Write, tmp_path: Path) -> None:
    remote = open_remote(url, "lr[1e-3] *b?", tmp_path / "run")
    upload(remote, write_step(NAME, 7))
    assert list(remote.manifests()) == [NAME]
    remote.discard(NAME)
    assert remote.manifests() == {}


def test_the_weights_at_a_remote_are_taken_as_pretrained(url: str, tmp_path: Path) -> None:
    model = create_model("tiny-test")
    write_checkpoint(tmp_path / "epoch_1", {"model.safetensors": model.state_dict()}, {}, step=1, epoch=1)
    remote = open_remote(url, "run", tmp_path / "run")
    upload(remote, tmp_path / "epoch_1")
    place = f"{url}/run/checkpoints/epoch_1"
    assert load_pretrained(create_model("tiny-test"), place).num_tensors == len(model.state_dict())


# ---- half of a checkpoint


class Cut(BaseException):
    """The process ends here."""


class CutShort:
    """A file system that ends the process at its nth change; a file on its way is half written then."""

    CHANGES = ("put_file", "pipe_file", "rm_file", "mv", "makedirs", "rmdir")

    def __init__(self, system: Any, left: int):
        self._system, self.left = system, left

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._system, name)
        return self._counted(name, attribute) if name in self.CHANGES else attribute

    def _counted(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left >= 0:
                return change(*args, **options)
            if name == "put_file":
                data = Path(args[0]).read_bytes()
                Path(args[1]).write_bytes(data[: len(data) // 2])
            elif name == "pipe_file":
                Path(args[0]).write_bytes(args[1][: len(args[1]) // 2])
            raise Cut

        return call


def cut_after(remote: Remote, changes: int, work: Callable[[], object]) -> bool:
    """Whether `work` got to its end before its last change."""
    remote._system = CutShort(remote._fs, changes)  # type: ignore[assignment]
    try:
        work()
    except Cut:
        return False
    return True


def what_a_reader_takes(url: str, tmp_path: Path) -> int | None:
    """The step of the checkpoint that is there, None if there is none; a half one fails the test."""
    shutil.rmtree(tmp_path / "reader", ignore_errors=True)
    remote = Remote(url)
    if remote.manifests().get(NAME) is None:
        return None
    return verify_checkpoint(remote.fetch(NAME, tmp_path / "reader")).step


@pytest.mark.parametrize("before", [None, 7])
def test_a_reader_never_takes_half_an_upload_wherever_it_was_cut(
    before: int | None, write_step: Write, tmp_path: Path
) -> None:
    seen, changes, is_whole = [], 0, False
    while not is_whole:
        shutil.rmtree(tmp_path / "away", ignore_errors=True)
        remote = Remote(f"{tmp_path}/away/run")
        if before is not None:
            upload(remote, write_step(NAME, before))
        folder = write_step(NAME, 8)
        is_whole = cut_after(remote, changes, partial(upload, remote, folder))
        seen.append(what_a_reader_takes(remote.url, tmp_path))
        # Whatever was left there, the next upload makes it whole.
        upload(Remote(remote.url), folder)
        assert what_a_reader_takes(remote.url, tmp_path) == 8
        changes += 1
    assert seen == [before] + [None] * (changes - 2) + [8] and changes > 4


def test_a_reader_never_takes_half_a_removed_one_and_the_rest_can_be_removed(write_step: Write, tmp_path: Path) -> None:
    seen, changes, is_whole = [], 0, False
    while not is_whole:
        remote = Remote(f"{tmp_path}/away/run")
        upload(remote, write_step(NAME, 7))
        is_whole = cut_after(remote, changes, partial(remote.discard, NAME))
        seen.append(what_a_reader_takes(remote.url, tmp_path))
        Remote(remote.url).discard(NAME)
        assert not list((tmp_path / "away/run/checkpoints").iterdir())
        changes += 1
    assert seen == [7] + [None] * (changes - 1) and changes > 3


def test_a_small_file_is_the_old_or_the_new_one_wherever_its_writing_was_cut(tmp_path: Path) -> None:
    changes, is_whole = 0, False
    while not is_whole:
        remote = Remote(f"{tmp_path}/away/run")
        remote.write("metrics.jsonl", b"old\n" * 10)
        is_whole = cut_after(remote, changes, partial(remote.write, "metrics.jsonl", b"new\n" * 20))
        assert Remote(remote.url).read("metrics.jsonl") in (b"old\n" * 10, b"new\n" * 20)
        changes += 1
    assert Remote(remote.url).read("metrics.jsonl") == b"new\n" * 20


def test_what_changes_during_its_upload_gets_no_manifest(
    away: Remote, write_step: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_step(NAME, 7)
    put_file = away._fs.put_file

    def replace_meanwhile(source: str, target: str) -> None:
        put_file(source, target)
        write_step(NAME, 8)

    monkeypatch.setattr(away._fs, "put_file", replace_meanwhile)
    with pytest.raises(Replaced):
        upload(away, folder)
    assert away.manifests() == {NAME: None}


def test_what_is_deleted_during_its_upload_gets_no_manifest(
    away: Remote, write_step: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_step(NAME, 7)
    put_file = away._fs.put_file

    def delete_meanwhile(source: str, target: str) -> None:
        put_file(source, target)
        shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr(away._fs, "put_file", delete_meanwhile)
    with pytest.raises(Replaced):
        upload(away, folder)
    assert away.manifests() == {NAME: None}


def test_an_object_of_another_size_than_the_file_gets_no_manifest(
    away: Remote, write_step: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_step(NAME, 7)
    monkeypatch.setattr(away._fs, "size", lambda path: 3)
    with pytest.raises(RemoteError, match=f"of {NAME} has 3 bytes there, and"):
        upload(away, folder)
    assert away.manifests() == {NAME: None}


@pytest.mark.parametrize("damage", ["bytes", "file", "manifest", "none"])
def test_a_damaged_checkpoint_is_refused_with_its_place_and_leaves_nothing_here(
    damage: str, away: Remote, write_step: Write, tmp_path: Path
) -> None:
    upload(away, write_step(NAME, 7))
    there = tmp_path / "away/run/checkpoints" / NAME
    if damage == "bytes":
        (there / "a.json").write_bytes(b"X" * (there / "a.json").stat().st_size)
    elif damage == "manifest":
        (there / MANIFEST).write_text((there / MANIFEST).read_text().replace('"step": 7', '"step": 9'))
    else:
        (there / ("a.json" if damage == "file" else MANIFEST)).unlink()
    messages = {
        "bytes": "a.json is damaged",
        "file": "a.json is missing",
        "manifest": "is damaged",
        "none": "has no manifest.json",
    }
    with pytest.raises(CheckpointError, match=f"away/run/checkpoints/{NAME}.*{messages[damage]}") as caught:
        away.fetch(NAME, tmp_path / "other")
    assert not isinstance(caught.value, RemoteError)
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())


# ---- what a remote may do


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/x", "Protocol not known: nosuch"),
        ("s3://no-such-bucket-anywhere/x", "bucket does not exist"),
        ("/proc/x", "No such file or directory"),
        ("https://127.0.0.1:1/x", "127.0.0.1"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_at_the_start(
    url: str, message: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, RemoteError), match=f"--remote-sync: {url}/run .*{message}") as caught:
        open_remote(url, "run", tmp_path / "run")
    assert caught.value.exit_code == (EXIT_FAILED if url.startswith("https") else EXIT_CONFIG)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="install gcsfs"):
            open_remote("gs://bucket", "run", tmp_path / "run")
    else:
        pytest.skip("gcsfs is installed here")


def test_a_missing_bucket_is_not_made(s3_server: S3Server, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="does not exist"):
            open_remote("s3://made-by-nobody/x", "run", tmp_path / "run")


def test_the_run_folder_itself_is_no_remote(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(ConfigError, match="is where the run itself is"):
            open_remote(url, "run", tmp_path / "run")


def test_a_remote_that_may_be_read_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, path: str, content: bytes) -> None:
        raise PermissionError(f"Access Denied: https://user:secret@host/{path}")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", refuse)
    with pytest.raises(ConfigError, match="cannot be written: Access Denied") as caught:
        open_remote("memory://read-only", "run", tmp_path / "run")
    assert "secret" not in str(caught.value)


def test_a_silent_remote_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "ANSWER_WITHIN_S", 0.2)
    with pytest.raises(RemoteError, match=r"the bucket does not answer within 0\.2 s") as caught:
        in_time(lambda: time.sleep(30), "the bucket")
    assert caught.value.exit_code == EXIT_FAILED
    assert in_time(lambda: 3, "the bucket") == 3
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 // 0, "the bucket")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE_S", 0.001)


def test_a_request_that_fails_is_tried_again_and_a_refusal_is_not(no_pauses: None) -> None:
    calls: list[int] = []

    def fail(times: int, cause: Exception) -> int:
        calls.append(1)
        if len(calls) <= times:
            raise RemoteError("busy") from cause
        return len(calls)

    assert insist(lambda: fail(2, OSError("reset"))) == 3
    calls.clear()
    with pytest.raises(RemoteError):
        insist(lambda: fail(9, OSError("reset")))
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(RemoteError):
        insist(lambda: fail(9, PermissionError("no")))
    assert len(calls) == 1


def test_a_fetch_survives_a_connection_that_breaks(
    no_pauses: None, away: Remote, write_step: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(away, write_step(NAME, 7))
    broken: list[str] = []

    def break_once(source: str, target: str) -> None:
        if source not in broken:
            broken.append(source)
            Path(target).write_bytes(b"half")
            raise ConnectionResetError("reset by peer")
        shutil.copyfile(source, target)

    system = away._fs
    monkeypatch.setattr(system, "get_file", break_once)
    monkeypatch.setattr(remote_module, "_client", lambda url: (system, url))
    assert verify_checkpoint(away.fetch(NAME, tmp_path / "other")).step == 7
    assert len(broken) == 2


def test_the_client_is_made_anew_after_an_error(away: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    first = away._fs
    monkeypatch.setattr(first, "pipe_file", lambda *a: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(RemoteError, match="broken"):
        away.write("a", b"b")
    away.write("a", b"b")
    assert away._fs is not first and away.read("a") == b"b"


def test_a_url_names_a_checkpoint_by_its_last_part() -> None:
    remote, name = remote_checkpoint("s3://bucket/logs/run/checkpoints/epoch_3/")
    assert (remote.url, name) == ("s3://bucket/logs/run/checkpoints", "epoch_3")
    with pytest.raises(CheckpointError, match="named epoch_<N> or step_<N>"):
        remote_checkpoint("s3://bucket/epoch_3.pt")


def test_nothing_is_listed_as_a_checkpoint_that_is_not_named_as_one(away: Remote, tmp_path: Path) -> None:
    for name in ("epoch_x", ".tmp-epoch_1-host-1", "results"):
        (tmp_path / "away/run/checkpoints" / name).mkdir(parents=True)
    assert away.manifests() == {} and list_checkpoints(tmp_path / "away/run/checkpoints") == []
