from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import ShardError, TarError
from data.samples import RawSample
from data.storage import ByteStream, open_stream
from data.tar import count_tar_samples, read_samples

Member = tuple[str, bytes]


class Memory(ByteStream):
    """Bytes as a stream."""

    def __init__(self, content: bytes, offset: int = 0):
        self._content = content
        self.position = offset

    def read(self, size: int) -> bytes:
        data = self._content[self.position : self.position + size]
        self.position += len(data)
        return data


def make_tar(members: Iterable[Member], tar_format: int = tarfile.PAX_FORMAT, mtime: float = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(content: bytes, *numbers: int | None, offset: int = 0, first: int = 0) -> list[RawSample]:
    return list(read_samples(Memory(content, offset), "a.tar", *numbers, first=first))  # type: ignore[arg-type]


def summary(samples: Iterable[RawSample]) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, sample.fields) for sample in samples]


def whole(key: str, size: int = 10) -> list[Member]:
    return [(f"{key}.jpg", b"j" * size), (f"{key}.txt", key.encode())]


NAMES = st.text("abcXYZ_-/é", min_size=1, max_size=40).filter(
    lambda name: "//" not in name and not name.startswith("/") and not name.endswith("/") and not name.startswith("__")
)


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(NAMES, max_size=6, unique=True),
    sizes=st.lists(st.integers(0, 1500), min_size=6, max_size=6),
    tar_format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mtime=st.sampled_from([0, 1.5]),
    long=st.booleans(),
)
def test_reads_what_webdataset_and_tarfile_read(
    keys: list[str], sizes: list[int], tar_format: int, mtime: float, long: bool
) -> None:
    prefix = "d" * 90 + "/" + "e" * 50 + "/" if long else ""
    members = [
        (f"{prefix}{key}.{extension}", bytes([index]) * size)
        for index, (key, size) in enumerate(zip(keys, sizes, strict=False))
        for extension in ("jpg", "json", "txt")
    ]
    content = make_tar(members, tar_format, mtime)
    samples = read(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        by_name = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert by_name == {f"{s.key}.{extension}": data for s in samples for extension, data in s.fields.items()}
    files = webdataset.tariterators.tar_file_expander([{"url": "a.tar", "stream": io.BytesIO(content)}])
    theirs = list(webdataset.tariterators.group_by_keys(files))
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in samples]
    assert [{k: v for k, v in sample.items() if k[0] != "_"} for sample in theirs] == [s.fields for s in samples]
    assert [sample.index for sample in samples] == list(range(len(samples)))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        pytest.param(["b.c.jpg", "b.c.txt", "b.d.jpg", "b.d.txt"], {"b.c": "jpg txt", "b.d": "jpg txt"}, id="dots"),
        pytest.param(["x.jpg", "x.seg.png", "x.txt", "y.jpg"], {"x": "jpg seg.png txt", "y": "jpg"}, id="compound"),
        pytest.param(["x.aux.png", "x.jpg", "x.txt"], {"x": "aux.png jpg txt"}, id="compound-first"),
        pytest.param(["x.jpg", "x.txt", "x.seg.png"], {"x": "jpg txt seg.png"}, id="compound-last"),
        pytest.param(["1.jpg", "1.txt", "1.5.jpg", "1.5.txt"], {"1": "jpg txt", "1.5": "jpg txt"}, id="numbers"),
        pytest.param(["1.5.jpg", "1.5.txt", "1.jpg", "1.txt"], {"1.5": "jpg txt", "1": "jpg txt"}, id="numbers-sorted"),
        pytest.param(["1.jpg", "1.cls", "1.5.jpg", "1.5.cls"], {"1": "jpg cls", "1.5": "jpg cls"}, id="labels"),
        pytest.param(["x.JPG", "x.Txt"], {"x": "jpg txt"}, id="upper-case"),
        pytest.param(["a/x.jpg", "a/x.txt", "b/x.jpg"], {"a/x": "jpg txt", "b/x": "jpg"}, id="folders"),
        pytest.param(["v1.0/x.jpg", "v1.0/x.txt"], {"v1.0/x": "jpg txt"}, id="dotted-folder"),
        pytest.param(["x.jpg", "._x.jpg", ".hidden", "x.txt", "README"], {"x": "jpg txt"}, id="apple-double"),
        pytest.param(["__MACOSX/x.jpg", "x.jpg", "a/__MACOSX/._x", "__meta__/i.json"], {"x": "jpg"}, id="macosx"),
        pytest.param(["./x.jpg", "./x.txt"], {"./x": "jpg txt"}, id="dot-slash"),
        pytest.param(["x.a.b.c.png", "x.jpg", "x.txt"], {"x": "a.b.c.png jpg txt"}, id="deep"),
        pytest.param([], {}, id="empty"),
    ],
)
def test_members_become_samples_by_the_documented_rule(members: list[str], expected: dict[str, str]) -> None:
    samples = read(make_tar((name, name.encode()) for name in members))
    assert {sample.key: sorted(sample.fields) for sample in samples} == {
        k: sorted(v.split()) for k, v in expected.items()
    }


def test_a_repeated_extension_begins_a_new_sample() -> None:
    content = make_tar([("x.jpg", b"1"), ("x.txt", b"1"), ("x.jpg", b"2"), ("x.txt", b"2")])
    assert [sample.fields["jpg"] for sample in read(content)] == [b"1", b"2"]


def test_empty_members_stay() -> None:
    assert read(make_tar([("x.jpg", b""), ("x.txt", b"")]))[0].fields == {"jpg": b"", "txt": b""}


def test_folders_and_links_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d.d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.jpg"
            tar.addfile(info)
        info = tarfile.TarInfo("x.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert summary(read(buffer.getvalue())) == [("x", {"jpg": b"abc"})]


def test_a_base_256_size_is_understood() -> None:
    content = bytearray(make_tar([("x.jpg", b"abc")], tarfile.GNU_FORMAT))
    content[124:136] = b"\x80" + (3).to_bytes(11, "big")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    assert read(bytes(content))[0].fields["jpg"] == b"abc"


def test_gzip_is_unpacked() -> None:
    content = make_tar(whole("a") + whole("b", 100_000))
    packed = gzip.compress(content[:7000]) + gzip.compress(content[7000:])
    assert summary(read(packed)) == summary(read(content))
    with pytest.raises(TarError):
        read(packed[: len(packed) // 3])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.one_of(st.none(), st.integers(0, 8)), st.integers(0, 5))
def test_any_range_of_samples_is_the_slice(start: int, stop: int | None, first: int) -> None:
    content = make_tar([m for i in range(6) for m in whole(f"{i}", 300 * i)] + [("5.seg.png", b"s")], mtime=0.5)
    everything = read(content)
    assert read(content, start, stop) == everything[start:stop]
    offset = everything[first].offset
    assert read(content, first, stop, offset=offset, first=first) == everything[first:stop]
    assert count_tar_samples(Memory(content), "a.tar") == 6


_MEMBER = 4 * 512  # pax header, its record, header, content
_END_OF_MEMBERS = 5 * 2 * _MEMBER


@settings(max_examples=120, deadline=None)
@given(st.one_of(st.integers(0, _END_OF_MEMBERS + 1200), st.integers(0, 42).map(lambda block: block * 512)))
def test_a_tar_cut_anywhere_gives_its_whole_samples_and_an_error(cut: int) -> None:
    """Only between two members, or after the first block of the end mark, nothing says that more should come."""
    content = make_tar([m for i in range(5) for m in whole(f"{i}", 500)], mtime=0.5)
    everything = read(content)
    assert everything[4].offset == 4 * 2 * _MEMBER
    got, error = drain(content[:cut])
    if cut % _MEMBER == 0 or cut >= _END_OF_MEMBERS + 512:
        assert error is None
        members = [(s.key, name, data) for s in everything for name, data in s.fields.items()]
        assert [(s.key, name, data) for s in got for name, data in s.fields.items()] == members[: cut // _MEMBER]
    else:
        assert error is not None
        assert error.kind == "truncated"
        assert error.offset == cut
        # A sample is known to be whole once the next one's name, in its third block, has been read.
        assert got == everything[: sum(sample.offset + 3 * 512 <= cut for sample in everything[1:])]


def drain(content: bytes) -> tuple[list[RawSample], TarError | None]:
    got: list[RawSample] = []
    try:
        got.extend(read_samples(Memory(content), "a.tar"))
    except TarError as error:
        return got, error
    return got, None


def test_a_header_that_is_none_is_told_from_a_short_file() -> None:
    content = bytearray(make_tar(whole("a") + whole("b")))
    content[2 * 1024 + 5] ^= 1
    with pytest.raises(TarError, match="no tar header at byte 2048") as caught:
        read(bytes(content))
    assert caught.value.kind == "corrupt"
    with pytest.raises(TarError):
        read(b"<html>" + b" not found" * 100)


def test_nothing_is_read_after_the_last_wanted_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar([m for i in range(100) for m in whole(f"{i}", 10_000)]))
    with open_stream(str(path)) as stream:
        assert len(list(read_samples(stream, "a.tar", 0, 3))) == 3
        assert stream.position < 50_000


def whole_tar(form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for index, extension in itertools.product(range(3), ("jpg", "txt")):
            content = bytes(index + 1) * 300
            member = tarfile.TarInfo(f"{'folder/' * 20 * index}{index}.{extension}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


WHOLE = [whole_tar(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
DAMAGE = st.tuples(st.integers(0, 60), st.integers(0, 511), st.integers(0, 255), st.booleans())


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WHOLE), st.lists(DAMAGE, min_size=1, max_size=4), st.none() | st.integers(0, 30_000))
def test_damage_of_any_kind_is_an_error_of_the_shard(
    content: bytes, damage: list[tuple[int, int, int, bool]], cut: int | None
) -> None:
    """Bytes overwritten in any place, some with a checksum that fits again, and an end too early."""
    broken = bytearray(content)
    for block, place, value, is_signed in damage:
        start = block * 512 % len(broken)
        broken[start + place] = value
        if is_signed:
            broken[start + 148 : start + 156] = b" " * 8
            broken[start + 148 : start + 156] = b"%06o\0 " % sum(broken[start : start + 512])
    with contextlib.suppress(ShardError):
        assert sum(raw.num_bytes for raw in read(bytes(broken[:cut]))) <= len(broken)


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000g00000\0", b"\x80" + bytes(4) + b"\x7f" * 7]
)
def test_a_size_that_is_none_is_damage_and_costs_no_memory(size: bytes) -> None:
    broken = bytearray(WHOLE[0])
    broken[124:136] = size
    broken[148:156] = b" " * 8
    broken[148:156] = b"%06o\0 " % (sum(broken[:512]))
    with pytest.raises(TarError):
        read(bytes(broken))


def test_a_member_too_large_for_a_picture_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tar._MOST_TAKEN", 500)
    assert [set(raw.fields.values()) for raw in read(WHOLE[0])] == [{bytes(300)}, {b""}, {b""}]


def test_a_gzip_that_swells_is_inflated_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tar._MOST_TAKEN", 1 << 20)
    swollen = gzip.compress(make_tar([("a.jpg", bytes(200 << 20)), ("a.txt", b"x")]))
    assert len(swollen) < 1 << 20
    tracemalloc.start()
    try:
        assert summary(read(swollen)) == [("a", {"jpg": b"", "txt": b"x"})]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("record", [b"0 path=a.jpg\n", b"1 path=a.jpg\n", b"x path=a.jpg\n", b"- size=1\n"])
def test_a_broken_pax_record_is_damage(record: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    with pytest.raises(TarError, match="broken pax record"):
        read(info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + make_tar([("a.jpg", b"x")]))
