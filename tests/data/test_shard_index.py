from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.readers import TarReader
from data.shard_index import Indexes, ShardIndex, build_index, index_url, read_index
from data.storage import LocalStream, open_stream
from tests.data.faulty_server import serve
from tests.helpers.shards import write_shards

Shards = Callable[..., list[Path]]


def write_index(path: Path, stride: int = 8) -> ShardIndex:
    with open_stream(str(path)) as stream:
        index = build_index(stream, str(path), stride)
    Path(index_url(str(path))).write_bytes(index.to_json())
    return index


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of local files from now on."""
    sizes: list[int] = []
    read = LocalStream.read

    def counted(stream: LocalStream, size: int) -> bytes:
        data = read(stream, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(LocalStream, "read", counted)
    return sizes


@pytest.mark.parametrize("start", [1, 7, 8, 9, 63, 64, 99])
def test_a_shard_is_read_from_the_nearest_known_sample_on(shards: Shards, start: int, bytes_read: list[int]) -> None:
    path = shards([100])[0]
    expected = [raw for raw in TarReader().read(str(path)) if raw.index >= start]
    write_index(path)
    bytes_read.clear()
    assert list(TarReader().read(str(path), start)) == expected
    at_most = (100 - start + 7) / 100
    assert sum(bytes_read) <= path.stat().st_size * at_most + Path(index_url(str(path))).stat().st_size


def test_an_index_of_another_shard_is_noticed(shards: Shards, tmp_path: Path) -> None:
    path = shards([40])[0]
    expected = list(TarReader().read(str(path), 20))
    for other in (
        write_shards(tmp_path / "other", [3, 40])[1],
        write_shards(tmp_path / "large", [40], image_size=90)[0],
    ):
        write_index(other)
        shutil.copy(index_url(str(other)), index_url(str(path)))
        assert list(TarReader().read(str(path), 20)) == expected


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"samples": 3}', b'{"samples":1,"stride":0,"keys":[],"offsets":[]}']
)
def test_an_unreadable_index_is_none(shards: Shards, content: bytes) -> None:
    path = shards([3])[0]
    Path(index_url(str(path))).write_bytes(content)
    assert read_index(str(path)) is None
    assert len(list(TarReader().read(str(path), 1))) == 2


def test_a_compressed_shard_has_a_count_but_no_places(shards: Shards) -> None:
    plain = shards([9])[0]
    path = plain.with_name("a.tar.gz")
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert write_index(path, stride=2) == ShardIndex(9, 2, [], [])
    assert [raw.index for raw in TarReader().read(str(path), 7)] == [7, 8]


def test_a_folder_without_indexes_is_asked_once(shards: Shards) -> None:
    path = shards([3])[0]
    with serve() as server:
        server.objects = {f"/{number}.tar": path.read_bytes() for number in range(3)}
        indexes = Indexes()
        for number in range(3):
            assert indexes.before(f"{server.url}/{number}.tar?x=1", 2) is None
        assert [path for path, _ in server.requests] == ["/0_index.json?x=1"]


def test_an_index_beside_a_remote_shard_is_found(shards: Shards) -> None:
    path = shards([30])[0]
    index = write_index(path)
    with serve() as server:
        server.objects = {"/a.tar": path.read_bytes(), "/a_index.json": index.to_json()}
        assert [raw.index for raw in TarReader(chunk_bytes=4096).read(f"{server.url}/a.tar", 24)] == list(range(24, 30))
        begins = [
            int(asked.split("=")[1].split("-")[0]) for path, asked in server.requests if path == "/a.tar" and asked
        ]
        assert min(begins) == index.offsets[3]
    assert json.loads(index.to_json())["samples"] == 30
