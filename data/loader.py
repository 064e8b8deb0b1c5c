"""The training loader of one rank: worker processes, batches from their parts, position, limits of loss.

Workers are PyTorch's DataLoader processes. They come from a fork server that has imported torch once (a
plain fork of a process with CUDA or S3 threads hangs, spawning imports torch in each), stand in process
groups of their own, and ignore the signals by which a cluster ends a run: the trainer decides when they go.
They do not outlive it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import warnings
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.batch import Batch, Position, fingerprint_of
from data.config import LoaderConfig
from data.cursors import LaneCursor
from data.errors import DataConfigError, DataError
from data.fork_server import RUN_SIGNALS, WorkerContext, end_with_parent, scratch_folder, share_arenas
from data.handoff import Receiver
from data.order import block_bytes, deal, lanes_per_rank, streams_of
from data.preflight import PreflightReport, preflight
from data.prepare import Preparer
from data.readers import build_reader, with_shards
from data.stats import LoaderStats, check_skip_fraction
from data.storage import PROBE
from data.where import Filter, Where
from data.worker import Part, Plan, Tokenize, Worker, run_worker
from data.worker_status import Pages, WorkerState

_PREFLIGHT_CHUNK_BYTES = 1 << 20
_PREFETCH = 3  # parts that each worker may be ahead
_REPORT_S = 2.0
_GC_ALLOCATIONS = 50_000  # between searches of a worker for cyclic garbage


def build_train_loader(
    config: LoaderConfig, tokenize: Tokenize, rank: int, world_size: int, position: Position | None = None
) -> TrainLoader:
    """The loader of rank `rank` of `world_size`, from the start or from the run's merged `position`.

    tokenize: captions to int64 tokens [N, L]; picklable. DataConfigError if the position is of other data, or
    there is nothing to read.
    """
    config = with_shards(config)
    _check(config)
    if position is None:
        position = _beginning(config, lanes_per_rank(config.batch_size), world_size)
    else:
        position.check(config)
    if world_size > position.lanes:
        raise DataConfigError(f"--resume: the run's {position.lanes} lanes cannot be dealt to {world_size} ranks")
    mine = deal(range(position.lanes), world_size, rank)
    return TrainLoader(config, tokenize, position, mine)


def _beginning(config: LoaderConfig, lanes_of_rank: int, world_size: int) -> Position:
    """No cursors: a lane without one begins at its first sample. A rank need not list the lanes of all others."""
    streams = config.streams_per_lane
    block = block_bytes(config.shuffle_budget_mib, lanes_of_rank, config.workers, streams)
    return Position(lanes_of_rank * world_size, block, config.seed, fingerprint_of(config), {}, streams)


def run_preflight(config: LoaderConfig, tokenize: Tokenize, samples: int = 8, shards: int = 3) -> PreflightReport:
    """`data.preflight.preflight` with the reader and the preparation that a loader of `config` would use."""
    config = with_shards(config)
    reader = build_reader(config, _PREFLIGHT_CHUNK_BYTES, read_ahead=0, retry=PROBE)
    where = None if config.where is None else Filter(Where.parse(config.where))
    return preflight(config.sources, reader, Preparer(config), tokenize, samples, shards, where)


def _check(config: LoaderConfig) -> None:
    if not config.urls:
        raise DataConfigError("--train-data: no shards")
    if config.sizes is not None and len(config.sizes) != len(config.urls):
        raise DataConfigError(f"--train-data: {len(config.sizes)} shard sizes for {len(config.urls)} shards")
    if config.sizes is not None and not sum(config.sizes):
        raise DataConfigError("--train-data: all shards are empty")


class TrainLoader:
    """Endless batches of one rank; a context manager. Use from one thread."""

    def __init__(self, config: LoaderConfig, tokenize: Tokenize, start: Position, lanes: list[int]):
        self._config = config
        self._start = start
        streams = [stream for lane in lanes for stream in streams_of(lane, start.streams)]
        self._cursors = {stream: start.cursors[stream] if start.cursors else LaneCursor() for stream in streams}
        self._stats = LoaderStats()
        self._plan = Plan(config, tokenize, start.lanes, start.block_bytes, dict(self._cursors))
        self._num_workers = min(config.workers, len(lanes))
        self._receivers = [Receiver() for _ in range(max(1, self._num_workers))]
        self._pages = Pages(len(self._receivers))
        self._parts: Iterator[Any] | None = None
        self._processes: list[BaseProcess] = []
        self._context: WorkerContext | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch. DataError when the data are too bad to go on, or a worker died."""
        parts = [self._next_part(receiver) for receiver in self._receivers]
        if self._context is not None:
            self._context.forget_names()
            self._context = None
        for part in parts:
            self._stats.add(part.stats)
        check_skip_fraction(self._stats, self._config.max_skip_fraction)
        batch = _assemble(parts, self._config.batch_size)
        for part in parts:
            self._cursors |= part.cursors
        return batch

    def position(self) -> Position:
        """Where this rank's lanes stand after the batches that were taken, whatever workers have prepared since."""
        return dataclasses.replace(self._start, cursors=dict(self._cursors))

    def stats(self) -> LoaderStats:
        """Counts since this loader began, of what the batches taken cost."""
        self._stats.epochs = min(cursor.epoch for cursor in self._cursors.values())
        return self._stats

    def workers(self, with_stacks: bool = False) -> list[WorkerState]:
        """What each worker is at, stopped and hanging ones too; may be called from any thread.

        With `with_stacks` those that answer within a second say where they are. Without workers of its own the
        loader describes this process.
        """
        return self._pages.look(with_stacks)

    def close(self) -> None:
        """Ends the workers at once: they hold nothing that is not in the position. Then there are no more batches."""
        self._end_workers()
        self._parts = iter(())
        atexit.unregister(self._end_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_workers(self) -> None:
        for process in self._processes:
            if process.is_alive():  # The number of one that is gone may be somebody else's by now.
                _kill(process)
        for process in self._processes:
            process.join()
        self._processes = []

    def _next_part(self, receiver: Receiver) -> Part:
        if self._parts is None:
            self._parts = self._start_parts()
        try:
            item = next(self._parts)
        except StopIteration:
            raise DataError("the loader is closed") from None
        except (RuntimeError, OSError, EOFError) as error:
            self._raise_if_worker_died(error)
            raise
        if isinstance(item, DataError):
            raise item
        receiver.restore(item.images)
        return item

    def _start_parts(self) -> Iterator[Any]:
        if not self._num_workers:
            return run_worker(Worker(self._plan, note=self._pages.note(0)))
        before = set(multiprocessing.active_children())
        # Ours must run before multiprocessing's own exit handler, which would wait for workers that ignore SIGTERM.
        atexit.register(self._end_workers)
        try:
            self._context = WorkerContext()
            return _worker_parts(self._plan, self._num_workers, self._context, self._pages)
        finally:
            self._processes = [child for child in multiprocessing.active_children() if child not in before]

    def _raise_if_worker_died(self, error: BaseException) -> None:
        # A worker's connection can break before the fork server has reported its end.
        multiprocessing.connection.wait([process.sentinel for process in self._processes], _REPORT_S)
        for number, process in enumerate(self._processes):
            if not process.is_alive():
                how = process.exitcode
                died = f"was killed by signal {-how}" if how is not None and how < 0 else f"ended with code {how}"
                raise DataError(
                    f"loader worker {number} (pid {process.pid}) {died}; if memory ran out, lower --workers or "
                    "--shuffle-budget-mib"
                ) from error


def _worker_parts(plan: Plan, num_workers: int, context: WorkerContext, pages: Pages) -> Iterator[Any]:
    """Parts from `num_workers` processes: the first worker's of the first batch, the second's, and so on."""
    with warnings.catch_warnings():
        # More workers than cores is the user's choice, and right where storage is slow.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader: DataLoader[Any] = DataLoader(
            _Parts(plan, pages),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=_PREFETCH,
            persistent_workers=True,
            multiprocessing_context=context,
            worker_init_fn=_Setup(),
            generator=torch.Generator(),  # leaves the trainer's random numbers alone
        )
        return iter(loader)


class _Parts(IterableDataset[Any]):
    """A worker's parts as DataLoader wants them; one item a batch from every worker keeps its round robin in step."""

    def __init__(self, plan: Plan, pages: Pages):
        self._plan = plan
        self._pages = pages

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        note = self._pages.note(info.id)
        note.begin()
        # The loader reads one part while up to _PREFETCH more are under way.
        return run_worker(Worker(self._plan, info.id, info.num_workers, True, _PREFETCH + 1, note))


class _Setup:
    """Makes a worker of a process: the fork server's environment and folder are those of its own start."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._folder = os.getcwd()
        self._scratch = scratch_folder()

    def __call__(self, worker: int) -> None:
        for number in RUN_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        share_arenas()
        end_with_parent(self._scratch)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)  # out of reach of signals to the trainer's group, and one target together with its pipes
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._folder)
        # Cycles are rare here, and what there is to search (modules, vocabulary, blocks) is large and stays.
        gc.freeze()
        gc.set_threshold(_GC_ALLOCATIONS)


def _kill(process: BaseProcess) -> None:
    """Ends a worker together with the commands that it reads from."""
    assert process.pid is not None
    try:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        process.kill()


def _assemble(parts: list[Part], batch_size: int) -> Batch:
    """One batch from the workers' rows, in pinned memory where CUDA is in use."""
    filled = [part for part in parts if len(part.rows)]
    is_pinned = torch.cuda.is_initialized()

    def scatter(pieces: list[np.ndarray]) -> torch.Tensor:
        shape = (batch_size, *pieces[0].shape[1:])
        if is_pinned:
            whole = torch.empty(shape, dtype=torch.from_numpy(pieces[0]).dtype, pin_memory=True)
        else:
            whole = torch.from_numpy(np.empty(shape, pieces[0].dtype))  # on huge pages, which torch does not ask for
        rows_of_whole = whole.numpy()  # 70 times faster than index_copy_
        for part, piece in zip(filled, pieces, strict=True):
            rows_of_whole[part.rows] = piece
        return whole

    keys = np.empty(batch_size, dtype=object)
    shards = np.empty(batch_size, dtype=object)
    for part in filled:
        keys[part.rows], shards[part.rows] = part.keys, part.shards
    return Batch(
        images=scatter([part.images.array() for part in filled]),
        tokens=scatter([part.tokens for part in filled]),
        draws={name: scatter([part.draws[name] for part in filled]) for name in filled[0].draws},
        keys=keys.tolist(),
        shards=shards.tolist(),
    )
