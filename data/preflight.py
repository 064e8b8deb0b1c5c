"""A look at the data before a run spends anything on it: a few samples of a few shards, all the way to tokens.

Knows no lanes. Stops the run when nothing can be used, naming the reason; otherwise reports what it saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data.background import DaemonPool
from data.decode import header_of
from data.errors import DataConfigError, DataError, ShardError, StorageError
from data.prepare import Preparer, image_of
from data.readers import ShardReader
from data.samples import RawSample, SampleError
from data.storage import probe
from data.urls import Source, expand_sources, is_local, is_pipe, mask_url

_SHOWN = 3  # shards, keys and fields named in a message
_PROBED = 3  # sources asked for a byte


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

    @property
    def seen(self) -> int:
        """Samples looked at."""
        return self.valid + self.skipped.total()

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
        return "\n".join(lines)


def preflight(
    sources: Sequence[Source],
    reader: ShardReader,
    preparer: Preparer,
    tokenize: Callable[[list[str]], torch.Tensor],
    samples: int = 8,
    shards: int = 3,
) -> PreflightReport:
    """Reads `samples` samples of `shards` shards spread over the sources.

    Raises DataConfigError when none of these shards can be read, or none of the samples is valid, and DataError
    when the storage does not answer; a bad shard or sample among good ones is only reported.
    """
    report = PreflightReport()
    valid: list[str] = []
    urls = _spread([url for source in sources for url in source.urls], shards)
    pool = DaemonPool(max(1, len(urls)), "preflight")  # one after the other, dead storage would take as often as long
    reads = [pool.submit(_read, reader, url, samples) for url in urls]
    pool.close()
    for url, read in zip(urls, reads, strict=True):
        raw_samples, error = read.result()
        report.shards.append(mask_url(url))
        for raw in raw_samples:
            valid += _look_at(raw, preparer, report)
        if error is not None:
            report.failed[mask_url(url)] = _explain(error)
    if report.shards and len(report.failed) == len(report.shards):
        errors = [read.result()[1] for read in reads]
        is_away = all(isinstance(error, StorageError) and error.kind == "unreachable" for error in errors)
        raise (DataError if is_away else DataConfigError)(_nothing_readable(report))
    if not valid:
        raise DataConfigError(_nothing_valid(report, preparer.config.caption_key))
    _measure_captions(valid, tokenize, report)
    return report


def check_storage(train_data: str) -> None:
    """Asks the storage behind `--train-data` for a byte, before anything waits for its lists and indexes.

    Raises DataError when no source asked answers within seconds, DataConfigError when all of them refuse.
    """
    urls = [source.urls[0] for source in expand_sources(train_data) if source.urls]
    remote = [url for url in urls if not is_local(url) and not is_pipe(url)][:_PROBED]
    if not remote or len(remote) < len(urls[:_PROBED]):
        return
    pool = DaemonPool(len(remote), "preflight")
    probes = [pool.submit(probe, url) for url in remote]
    pool.close()
    errors = [asked.exception() for asked in probes]
    for kind, failure in (("unreachable", DataError), ("denied", DataConfigError)):
        if all(isinstance(error, StorageError) and error.kind == kind for error in errors):
            raise failure(f"--train-data: {mask_url(remote[0])}: {_explain(errors[0])}")  # type: ignore[arg-type]


def _spread(urls: Sequence[str], count: int) -> list[str]:
    """`count` different shards, first and last included."""
    unique = list(dict.fromkeys(urls))
    if len(unique) <= count or count < 2:
        return unique[:count]
    return [unique[round(i * (len(unique) - 1) / (count - 1))] for i in range(count)]


def _read(reader: ShardReader, url: str, count: int) -> tuple[list[RawSample], Exception | None]:
    """The first samples of a shard, and what ended it early."""
    found: list[RawSample] = []
    stream = reader.read(url, 0, count)
    try:
        found.extend(stream)
    except Exception as error:  # The reader's errors are as many as the storages behind it.
        return found, error
    finally:
        if hasattr(stream, "close"):
            stream.close()
    return found, None


def _look_at(raw: RawSample, preparer: Preparer, report: PreflightReport) -> list[str]:
    report.keys.append(raw.key)
    report.fields.update(raw.fields.keys())
    try:
        prepared = preparer.prepare(raw, ("preflight", raw.index))
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


def _nothing_valid(report: PreflightReport, caption_key: str) -> str:
    fields = ", ".join(sorted(report.fields)) or "none"
    if not report.seen:
        return f"--train-data: the shards looked at hold no samples ({', '.join(report.shards[:_SHOWN])})"
    reason, _ = report.skipped.most_common(1)[0]
    known = {
        "no_caption": f"no sample has a caption under {caption_key!r} (--caption-key)",
        "empty_caption": f"the captions under {caption_key!r} are empty",
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
