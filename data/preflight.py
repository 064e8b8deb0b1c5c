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

import torch

from data.background import DaemonPool
from data.decode import header_of
from data.errors import DataConfigError, DataError, ShardError, StorageError
from data.preflight_report import PreflightReport, counted
from data.prepare import Preparer, image_of
from data.readers import ShardReader
from data.samples import RawSample, SampleError, record_of
from data.storage import probe
from data.urls import Source, is_local, is_pipe, mask_url
from data.where import Filter

_SHOWN = 3  # shards and reasons named in a message
_PROBED = 3  # sources asked for a byte
_READ_FOR_ONE_KEPT = 100  # samples of a shard looked at for each that the filter should keep


@dataclass
class _Read:
    """What was read of one shard."""

    samples: list[RawSample] = field(default_factory=list)
    num_bytes: int = 0
    seconds: float = 0.0
    filtered: int = 0
    record_fields: set[str] = field(default_factory=set)  # of samples that were not kept
    error: Exception | None = None


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

    Raises DataConfigError when none of these shards can be read, or none of the samples is valid, and DataError
    when the storage does not answer; a bad shard or sample among good ones is only reported.
    """
    report = PreflightReport(is_filtered=where is not None)
    urls = _spread([url for source in sources for url in source.urls], shards)
    pool = DaemonPool(max(1, len(urls)), "preflight")  # one after the other, dead storage would take as often as long
    pending = [pool.submit(_read, reader, url, samples, where) for url in urls]
    pool.close()
    reads = [read.result() for read in pending]
    valid = [caption for url, read in zip(urls, reads, strict=True) for caption in _note(url, read, preparer, report)]
    if report.shards and len(report.failed) == len(report.shards):
        is_away = all(isinstance(read.error, StorageError) and read.error.kind == "unreachable" for read in reads)
        raise (DataError if is_away else DataConfigError)(_nothing_readable(report))
    if where is not None and not report.seen:
        raise DataConfigError(_nothing_kept(report, where))
    if not valid:
        raise DataConfigError(_nothing_valid(report, preparer.config.captions.names))
    _measure_captions(valid, tokenize, report)
    return report


def check_storage(sources: Sequence[Source]) -> None:
    """Asks the storage behind the sources for a byte, before anything waits for their lists and indexes.

    Raises DataError when no source asked answers within seconds, DataConfigError when all of them refuse.
    """
    urls = [source.urls[0] for source in sources if source.urls]
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


def _read(reader: ShardReader, url: str, count: int, where: Filter | None) -> _Read:
    """The first samples of a shard that `where` keeps, and what ended it early."""
    found = _Read()
    stream = reader.read(url, 0, count if where is None else count * _READ_FOR_ONE_KEPT)
    started = time.perf_counter()
    try:
        found.samples.extend(itertools.islice(_kept(stream, where, found), count))
    except Exception as error:  # The reader's errors are as many as the storages behind it.
        found.error = error
    finally:
        found.seconds = time.perf_counter() - started
        if hasattr(stream, "close"):
            stream.close()
    return found


def _kept(stream: Iterator[RawSample], where: Filter | None, found: _Read) -> Iterator[RawSample]:
    for raw in stream:
        found.num_bytes += raw.num_bytes
        if where is None or where.keeps(raw):
            yield raw
        else:
            found.filtered += 1
            found.record_fields |= _fields_of_record(raw)


def _fields_of_record(raw: RawSample) -> set[str]:
    try:
        record = record_of(raw)
    except SampleError:
        return set()
    return set(record) if isinstance(record, dict) else set()


def _note(url: str, read: _Read, preparer: Preparer, report: PreflightReport) -> list[str]:
    """Captions of the valid samples read; everything else goes into the report."""
    report.shards.append(mask_url(url))
    report.num_bytes += read.num_bytes
    report.read_s += read.seconds
    report.filtered += read.filtered
    report.record_fields |= read.record_fields
    if read.error is not None:
        report.failed[mask_url(url)] = _explain(read.error)
    elif not read.samples and not read.filtered:
        report.empty.append(mask_url(url))
    return [caption for raw in read.samples for caption in _look_at(raw, preparer, report)]


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
        f"--train-data: none of {report.seen} samples looked at can be used ({counted(report.skipped)}): "
        f"{plain}; fields seen: {fields}"
    )


def _explain(error: BaseException) -> str:
    """Why a shard could not be read, in one line without secrets."""
    reason = error.reason if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
    return _short(mask_url(reason))


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
