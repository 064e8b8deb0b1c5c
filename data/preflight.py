"""A look at the data before a run spends anything on it: a few samples of a few shards, all the way to tokens.

Knows no lanes. Stops the run when nothing can be used, naming the reason; otherwise reports what it saw, and how
fast it could be read and decoded: by one process, one sample after the other, storage's first answer included.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data.decode import header_of
from data.errors import DataConfigError, ShardError
from data.prepare import Preparer, image_of
from data.readers import ShardReader
from data.samples import RawSample, SampleError, record_of
from data.urls import Source, mask_url
from data.where import Filter

_SHOWN = 3  # shards, keys and fields named in a message
_MIB = 1 << 20
_READ_FOR_ONE_KEPT = 100  # samples of a shard looked at for each that the filter should keep


@dataclass
class PreflightReport:
    """What the probed samples looked like; `str()` gives a few log lines."""

    shards: list[str] = field(default_factory=list)  # probed, masked for logs
    failed: dict[str, str] = field(default_factory=dict)  # probed shard -> why it cannot be read
    keys: list[str] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)  # height, width
    caption_lengths: list[int] = field(default_factory=list)  # tokens with start and end, before truncation
    context_length: int = 0
    valid: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)  # reason -> first message
    filtered: int = 0  # samples that --where does not keep
    is_filtered: bool = False
    record_fields: set[str] = field(default_factory=set)  # of the samples' JSON records
    num_bytes: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0

    @property
    def seen(self) -> int:
        """Samples looked at, those that --where does not keep left out."""
        return self.valid + self.skipped.total()

    @property
    def num_read(self) -> int:
        """Samples read."""
        return self.seen + self.filtered

    @property
    def share_truncated(self) -> float:
        """Share of captions longer than the model's context."""
        return sum(length > self.context_length for length in self.caption_lengths) / max(len(self.caption_lengths), 1)

    def caption_percentiles(self) -> tuple[int, int, int]:
        """Median, 95th percentile and maximum of the caption lengths in tokens."""
        p50, p95, most = np.percentile(self.caption_lengths or [0], (50, 95, 100), method="higher")
        return int(p50), int(p95), int(most)

    def __str__(self) -> str:
        lines = [f"preflight: {self.valid} of {self.seen} samples valid in {len(self.shards)} shards"]
        lines += [f"  {shard}: {reason}" for shard, reason in self.failed.items()]
        if self.is_filtered:
            lines.append(f"  --where keeps {self.seen} of {self.num_read} samples read")
        if self.skipped:
            lines.append(f"  skipped: {_counted(self.skipped)}")
        if self.keys:
            lines.append(f"  keys: {', '.join(self.keys[:_SHOWN])}, ...; fields: {', '.join(sorted(self.fields))}")
        if self.image_sizes:
            sizes = sorted(self.image_sizes, key=lambda size: size[0] * size[1])
            low, middle, high = (f"{w}x{h}" for h, w in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
            lines.append(f"  images: {_counted(self.formats)}; smallest {low}, median {middle}, largest {high}")
        if self.caption_lengths:
            p50, p95, most = self.caption_percentiles()
            cut = f"{self.share_truncated:.0%} longer than the context of {self.context_length}"
            lines.append(f"  captions: {p50} tokens median, {p95} at 95 %, {most} at most; {cut}")
        if self.valid:
            lines.append(
                f"  rates of one process: {self.num_bytes / _MIB / max(self.read_s, 1e-9):.1f} MiB/s read "
                f"({self.num_bytes / self.num_read / 1024:.1f} KiB a sample), "
                f"{self.valid / max(self.decode_s, 1e-9):.0f} samples/s decoded"
            )
        return "\n".join(lines)


def preflight(
    sources: Sequence[Source],
    reader: ShardReader,
    preparer: Preparer,
    tokenize: Callable[[list[str]], torch.Tensor],
    samples: int = 8,
    shards: int = 3,
    where: Filter | None = None,
) -> PreflightReport:
    """Reads `samples` samples that `where` keeps of `shards` shards spread over the sources.

    Raises DataConfigError when none of these shards can be read, or none of the samples is valid; a bad shard
    or sample among good ones is only reported.
    """
    report = PreflightReport(is_filtered=where is not None)
    valid: list[str] = []
    for url in _spread([url for source in sources for url in source.urls], shards):
        valid += _probe(url, reader, preparer, samples, where, report)
    if report.shards and len(report.failed) == len(report.shards):
        raise DataConfigError(_nothing_readable(report))
    if where is not None and not report.seen:
        raise DataConfigError(_nothing_kept(report, where))
    if not valid:
        raise DataConfigError(_nothing_valid(report, preparer.config.captions.names))
    _measure_captions(valid, tokenize, report)
    return report


def _spread(urls: Sequence[str], count: int) -> list[str]:
    """`count` different shards, first and last included."""
    unique = list(dict.fromkeys(urls))
    if len(unique) <= count or count < 2:
        return unique[:count]
    return [unique[round(i * (len(unique) - 1) / (count - 1))] for i in range(count)]


def _probe(
    url: str, reader: ShardReader, preparer: Preparer, samples: int, where: Filter | None, report: PreflightReport
) -> list[str]:
    """Captions of the valid ones among the first samples of a shard; everything else goes into the report."""
    name, captions = mask_url(url), []
    report.shards.append(name)
    stream = reader.read(url, 0, samples if where is None else samples * _READ_FOR_ONE_KEPT)
    try:
        for raw in itertools.islice(_kept(_timed(stream, report), where, report), samples):
            captions += _look_at(raw, preparer, report)
    except Exception as error:  # The reader's errors are as many as the storages behind it.
        report.failed[name] = _explain(error)
    finally:
        if hasattr(stream, "close"):
            stream.close()
    return captions


def _timed(stream: Iterator[RawSample], report: PreflightReport) -> Iterator[RawSample]:
    while True:
        started = time.perf_counter()
        raw = next(stream, None)
        report.read_s += time.perf_counter() - started
        if raw is None:
            return
        report.num_bytes += raw.num_bytes
        yield raw


def _kept(stream: Iterator[RawSample], where: Filter | None, report: PreflightReport) -> Iterator[RawSample]:
    for raw in stream:
        if where is None or where.keeps(raw):
            yield raw
        else:
            report.filtered += 1
            report.record_fields |= _fields_of_record(raw)


def _fields_of_record(raw: RawSample) -> set[str]:
    try:
        record = record_of(raw)
    except SampleError:
        return set()
    return set(record) if isinstance(record, dict) else set()


def _look_at(raw: RawSample, preparer: Preparer, report: PreflightReport) -> list[str]:
    report.keys.append(raw.key)
    report.fields.update(raw.fields.keys())
    started = time.perf_counter()
    try:
        prepared = preparer.prepare(raw, ("preflight", raw.index))
        report.decode_s += time.perf_counter() - started
        image_format, height, width = header_of(image_of(raw))
    except SampleError as error:
        report.skipped[error.reason] += 1
        report.details.setdefault(error.reason, str(error))
        return []
    report.formats[image_format] += 1
    report.image_sizes.append((height, width))
    report.valid += 1
    return [prepared.caption]


def _measure_captions(
    captions: list[str], tokenize: Callable[[list[str]], torch.Tensor], report: PreflightReport
) -> None:
    """Lengths before truncation where the tokenizer can tell (`encode`), otherwise of the truncated rows."""
    tokens = tokenize(captions)
    report.context_length = tokens.shape[1]
    encode = getattr(tokenize, "encode", None)
    if encode is not None:
        report.caption_lengths = [len(encode(caption)) + 2 for caption in captions]
    else:
        report.caption_lengths = [int(row.count_nonzero()) for row in tokens]


def _nothing_readable(report: PreflightReport) -> str:
    reasons = Counter(report.failed.values())
    first = next(iter(report.failed))
    which = "the shard" if len(report.failed) == 1 else f"none of {len(report.failed)} shards looked at can be read;"
    middle = f"{first} cannot be read:" if len(report.failed) == 1 else f"{first}:"
    more = [f"{count} x {reason}" for reason, count in reasons.items() if reason != report.failed[first]][:_SHOWN]
    return f"--train-data: {which} {middle} {'; '.join([report.failed[first], *more])}"


def _nothing_kept(report: PreflightReport, where: Filter) -> str:
    if not report.num_read:
        return f"--train-data: the shards looked at hold no samples ({', '.join(report.shards[:_SHOWN])})"
    unknown = sorted(where.where.fields - report.record_fields)
    missing = f"no record has {', '.join(map(repr, unknown))}; " if unknown else ""
    known = ", ".join(sorted(report.record_fields)) or "none: no sample has a json member that can be read"
    return f"--where keeps none of {report.num_read} samples looked at; {missing}fields of their records: {known}"


def _nothing_valid(report: PreflightReport, caption_keys: str) -> str:
    fields = ", ".join(sorted(report.fields)) or "none"
    if not report.seen:
        return f"--train-data: the shards looked at hold no samples ({', '.join(report.shards[:_SHOWN])})"
    reason, _ = report.skipped.most_common(1)[0]
    known = {
        "no_caption": f"no sample has a caption under {caption_keys} (--caption-key)",
        "empty_caption": f"the captions under {caption_keys} are empty",
        "no_image": "no sample has an image",
    }
    plain = known.get(reason, f"e.g. {report.details[reason]}")
    return (
        f"--train-data: none of {report.seen} samples looked at can be used ({_counted(report.skipped)}): "
        f"{plain}; fields seen: {fields}"
    )


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def _explain(error: BaseException) -> str:
    """Why a shard could not be read, in one line without secrets."""
    reason = error.reason if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
    return _short(mask_url(reason))


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
