"""Tar shards into raw samples, in one pass over the headers. Knows no URLs and no order.

Why not `tarfile`: it builds an object a member and costs more than reading the bytes. Read here: ustar, GNU
long names, pax paths and sizes, base-256 sizes, gzip. Every header's checksum is verified.

**Keys.** A member's extension is what follows the last dot of its name, its key all before (folders
included), so `photo.v2.jpg` and `photo.v2.txt` are one sample `photo.v2`. WebDataset's compound extensions
still work: next to `x.jpg` the member `x.seg.png` belongs to `x`, under "seg.png", unless `x.seg` is a whole
sample by itself (a picture and a text or label). A repeated extension begins a new sample. Ignored are folders,
links, names without a dot, hidden files, `__MACOSX` and WebDataset's `__meta__` members.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterator

from data.errors import TarError
from data.samples import RawSample
from data.storage import ByteStream

_BLOCK = 512
_END = bytes(_BLOCK)
_REGULAR = frozenset(b"\x0007")
_WITHOUT_CONTENT = frozenset(b"123456")  # links, devices, folders, FIFOs
_EXTENSIONS = frozenset(b"xXgLK")  # describe the member that follows
_MOST_INFLATED = 8 << 20  # at a time: a few bytes of gzip may stand for gigabytes
_META = re.compile(rb"__[^/]*__(?:$|/)|(?:.*/)?__MACOSX/", re.DOTALL)
_ADLER_MODULUS = 65521
_MOST_BYTES = 1 << 50  # of an archive; a larger size in a header is damage
_MOST_TAKEN = 1 << 28  # a larger member is passed over: no picture, and a damaged size must not cost the memory
_IMAGES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"))
_TEXTS = frozenset(("txt", "json", "caption", "cls"))


def read_samples(
    stream: ByteStream, shard: str, start: int = 0, stop: int | None = None, *, first: int = 0
) -> Iterator[RawSample]:
    """The samples number `start` to `stop` (exclusive) of `shard`, in its order.

    `stream` may begin at a later sample: then `first` is that sample's number, and `stream.position` is
    the byte at which it begins. Empty members are kept as b"". Raises TarError after the last whole sample
    when the tar is cut short or broken, and passes on the StorageError of a stream that fails.
    """
    if stop is not None and stop <= start:
        return
    for index, run in enumerate(_runs(_Members(stream, shard), start - first), first):
        if index >= start:
            yield RawSample(run.key.decode("utf-8", "replace"), shard, index, run.fields, run.offset)
        if stop is not None and index + 1 >= stop:
            return


def walk_samples(stream: ByteStream, shard: str) -> Iterator[tuple[str, int]]:
    """Key and offset (-1 in a compressed tar) of each sample that `read_samples` would yield. Same errors.

    Contents are passed over, so that only headers are read where the stream can skip.
    """
    for run in _runs(_Members(stream, shard), sys.maxsize):
        yield run.key.decode("utf-8", "replace"), run.offset


def count_tar_samples(stream: ByteStream, shard: str) -> int:
    """How many samples `read_samples` would yield, from the headers alone where the stream can skip. Same errors."""
    return sum(1 for _ in walk_samples(stream, shard))


class _Run:
    """Members that follow one another under one key."""

    __slots__ = ("fields", "key", "offset")

    def __init__(self, key: bytes, offset: int):
        self.key = key
        self.offset = offset
        self.fields: dict[str, bytes] = {}

    def is_sample(self) -> bool:
        return not _IMAGES.isdisjoint(self.fields) and not _TEXTS.isdisjoint(self.fields)

    def is_related(self, key: bytes) -> bool:
        """Whether `key` may belong to the same sample: x and x.seg, in either order."""
        return key == self.key or key.startswith(self.key + b".") or self.key.startswith(key + b".")

    def merge(self, other: _Run) -> bool:
        """Takes in a related run, under compound extensions; False where the two are samples of their own."""
        if other.key == self.key:
            if not self.fields.keys().isdisjoint(other.fields):
                return False
            self.fields |= other.fields
            return True
        short, long = sorted((self, other), key=lambda run: len(run.key))
        if not long.key.startswith(short.key + b".") or long.is_sample():
            return False
        prefix = long.key[len(short.key) + 1 :].decode("utf-8", "replace").lower()
        self.fields = short.fields | {f"{prefix}.{extension}": data for extension, data in long.fields.items()}
        self.key = short.key
        return True


def _runs(members: _Members, num_skipped: int) -> Iterator[_Run]:
    """Whole samples as runs; the contents of the first `num_skipped` are not read."""
    held: _Run | None = None  # whole, unless the run after it turns out to be a part of it
    run: _Run | None = None
    count = 0
    try:
        while members.advance():
            if run is None or members.key != run.key or members.extension in run.fields:
                if run is not None:
                    done, held = _settle(held, run, members.key)
                    yield from done
                    count += len(done)
                run = _Run(members.key, members.offset)
            is_skipped = count + (held is not None) < num_skipped
            run.fields[members.extension] = members.skip() if is_skipped else members.take()
    except TarError:
        if held is not None:
            yield held
        raise
    if run is not None:
        yield from _settle(held, run, None)[0]


def _settle(held: _Run | None, run: _Run, key: bytes | None) -> tuple[list[_Run], _Run | None]:
    """The samples that are whole when a member of `key` (None: the end) follows `run`, and the one that may grow."""
    done = []
    if held is None or not held.merge(run):
        if held is not None:
            done.append(held)
        held = run
    if key is None or not held.is_related(key):
        return [*done, held], None
    return done, held


class _Members:
    """The regular, named files of a tar, one after the other; each must be taken or skipped before the next."""

    def __init__(self, stream: ByteStream, shard: str):
        self._stream = stream
        self._shard = shard
        self._header = stream.read(_BLOCK)
        self._at = stream.position - len(self._header)  # byte of `_header`
        self._size = 0
        self._has_offsets = True
        self._defaults: dict[str, bytes] = {}  # of a pax global header
        self.key = b""
        self.extension = ""
        self.offset = -1  # where the member begins, headers that describe it included
        if self._header[:2] == b"\x1f\x8b":
            self._stream = _Gunzipped(self._header, stream, shard)
            self._header, self._at, self._has_offsets = self._stream.read(_BLOCK), 0, False

    def advance(self) -> bool:
        """Moves to the next file that is part of a sample; False at the end of the archive."""
        described: dict[str, bytes] = {}
        begin = self._at
        while (header := self._header) and header != _END:
            kind = self._verified_kind(header)
            size = self._checked(_number_or_none(header[124:136]))
            if kind in _EXTENSIONS:
                self._size = size
                self._describe(kind, self.take(), described)
                continue
            if self._defaults:
                described = self._defaults | described
            if "size" in described:
                size = self._checked(int(described["size"]) if described["size"].isdigit() else None)
            self._size = size
            name = described["path"] if "path" in described else _name_in(header)
            if kind in _REGULAR and self._split(name):
                self.offset = begin if self._has_offsets else -1
                return True
            if kind in _WITHOUT_CONTENT:
                self._size = 0
            self.skip()
            described, begin = {}, self._at
        if not header and begin < self._at:  # the file that a long name or pax record describes is missing
            raise self._cut(self._at)
        return False

    def take(self) -> bytes:
        """The content of the current file; b"" for one that no sample needs."""
        size = self._size
        if size > _MOST_TAKEN:
            return self.skip()
        data = self._stream.read(size)
        if len(data) != size:
            raise self._cut(self._at + _BLOCK + len(data))
        self._to_next(size)
        return data

    def skip(self) -> bytes:
        """Passes over the current file's content; b"" in its place."""
        skipped = self._stream.skip(self._size)
        if skipped != self._size:
            raise self._cut(self._at + _BLOCK + skipped)
        self._to_next(self._size)
        return b""

    def _to_next(self, size: int) -> None:
        """Reads the header after a content of `size` bytes. None at all is an end, too: not every writer marks it."""
        padding = -size % _BLOCK
        tail = self._stream.read(padding + _BLOCK)
        self._at += _BLOCK + size + padding
        self._header = tail[padding:]
        if len(tail) < padding or 0 < len(self._header) < _BLOCK:
            raise self._cut(self._at - max(0, padding - len(tail)) + len(self._header))

    def _verified_kind(self, header: bytes) -> int:
        """The type flag of a header whose checksum is right."""
        if len(header) < _BLOCK:
            raise self._cut(self._at + len(header))
        # Adler-32 keeps the sum of the bytes, modulo 65521, in its low half: ten times faster than sum().
        field = header[148:156]
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * ord(" ")
        stored = _number_or_none(field)
        if stored is None or ((total - stored) % _ADLER_MODULUS and stored != _signed_sum(header)):
            raise TarError(self._shard, "no tar header", self._at, kind="corrupt")
        return header[156]

    def _checked(self, size: int | None) -> int:
        if size is None or not 0 <= size < _MOST_BYTES:
            raise TarError(self._shard, "a header without a size", self._at, kind="corrupt")
        return size

    def _split(self, name: bytes) -> bool:
        """Key and extension of a file; False for one that belongs to no sample."""
        base = name.rfind(b"/") + 1
        dot = name.rfind(b".")
        if dot <= base or name[base] == 0x2E or (b"__" in name and _META.match(name)):
            return False
        self.key = name[:dot]
        self.extension = name[dot + 1 :].lower().decode("utf-8", "replace")
        return True

    def _describe(self, kind: int, content: bytes, described: dict[str, bytes]) -> None:
        """A long name or a pax record: it describes the next member (or, for g, all that follow)."""
        if kind == ord("L"):
            described["path"] = content.split(b"\0", 1)[0]
        elif kind == ord("K") or (b" path=" not in content and b" size=" not in content):
            return  # most records hold a time stamp only
        elif kind == ord("g"):
            self._defaults |= self._pax(content)
        else:
            described |= self._pax(content)

    def _pax(self, content: bytes) -> dict[str, bytes]:
        """`path` and `size` of a pax record: lines "length key=value"."""
        found: dict[str, bytes] = {}
        while content and content[:1] != b"\0":
            digits, _, _ = content.partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            key, separator, value = content[len(digits) + 1 : length - 1].partition(b"=")
            if not separator or length <= len(digits):
                raise TarError(self._shard, "broken pax record", self._at, kind="corrupt")
            if key in (b"path", b"size"):
                found[key.decode()] = value
            content = content[length:]
        return found

    def _cut(self, offset: int) -> TarError:
        return TarError(self._shard, "cut short", offset)


class _Gunzipped(ByteStream):
    """The content of a gzip stream of which `head` was read already."""

    def __init__(self, head: bytes, stream: ByteStream, shard: str):
        self._stream = stream
        self._shard = shard
        self._compressed = head
        self._inflater = zlib.decompressobj(wbits=31)
        self._ready = bytearray()
        self.position = 0

    def read(self, size: int) -> bytes:
        """See `ByteStream.read`."""
        while len(self._ready) < size and self._inflate():
            pass
        data = bytes(self._ready[:size])
        del self._ready[:size]
        self.position += len(data)
        return data

    def close(self) -> None:
        """The stream below belongs to the caller."""

    def _inflate(self) -> bool:
        data = self._compressed or self._stream.read(1 << 20)
        if not data:
            return False
        try:
            self._ready += self._inflater.decompress(data, _MOST_INFLATED)
            self._compressed = self._inflater.unconsumed_tail
        except zlib.error as error:
            raise TarError(
                self._shard, f"broken gzip stream ({error})", self._stream.position, kind="corrupt"
            ) from error
        if self._inflater.eof:  # gzip files may follow one another
            self._compressed = self._inflater.unused_data.lstrip(b"\0")
            self._inflater = zlib.decompressobj(wbits=31)
        return True


def _name_in(header: bytes) -> bytes:
    """The member's path in a header, with ustar's prefix."""
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU headers keep other things there
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _number(field: bytes) -> int:
    """An octal field, or a base-256 one as GNU writes for sizes of 8 GiB and more."""
    if field[0] < 0x80:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)


def _number_or_none(field: bytes) -> int | None:
    try:
        return _number(field)
    except ValueError:
        return None


def _signed_sum(header: bytes) -> int:
    """The checksum as some old writers computed it, with signed bytes."""
    rest = header[:148] + b" " * 8 + header[156:]
    return sum(byte - 256 if byte > 127 else byte for byte in rest)
