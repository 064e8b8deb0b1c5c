"""The ranks of a run: their session, their agreements, their shared errors. Knows no model and no data.

What one rank finds, all ranks learn before anyone raises: `collectively` and `on_main` are the two ways
to do rank-dependent work without leaving the others waiting in a collective. `wait_for` and `on_main_at_length`
are for what may take longer than a collective may.
"""

from __future__ import annotations

import os
import pickle
import resource
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from training.config import ClusterConfig
from training.errors import EXIT_FAILED, ConfigError, PeerError, StoppedEarly
from training.health import STORE_ERRORS, Health, watched
from training.launch import Launch, read_launch
from training.pulse import Pulse
from training.rendezvous import open_store
from training.roll import Roll
from training.rollcall import call_roll, make_card
from training.timeouts import Timeouts, limits_of

T = TypeVar("T")

_LONGEST_ROUND_S = 60.0
_ASKING_ROUND_S = 5.0


@dataclass(frozen=True)
class World:
    """This rank's place and its means of agreement. A world of one needs no process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"
    launcher: str = "single process"
    # A gloo group on the host: agreements must neither wait for the GPU's queue nor fill it.
    control: dist.ProcessGroup | None = None
    # What a collective may take; whoever needs longer meets the others in between.
    timeout_s: float = 600.0
    roll: Roll = Roll()  # who came
    pulse: Pulse = field(default_factory=Pulse)
    timeouts: Timeouts | None = None
    health: Health | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which owns the files of the run."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with self.pulse.waiting("barrier"):
                dist.barrier(group=self.control)  # Collective:

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.pulse.waiting("gather"):
            dist.all_gather_object(values, value, group=self.control)  # Collective:
        return values

    def gather_object(self, value: T) -> list[T] | None:
        """Every rank's value, by rank, on rank 0; None elsewhere. What many ranks say, only one needs to read."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        # One length for all: torch's own gather of objects sends all lengths around the ring of ranks first.
        padded = own.new_zeros(self.max_int(len(own)))
        padded[: len(own)] = own
        rows = [torch.empty_like(padded) for _ in range(self.size)] if self.is_main else None
        with self.pulse.waiting("gather"):
            dist.gather(padded, rows, group=self.control)  # Collective:
        return None if rows is None else [pickle.loads(row.numpy().tobytes()) for row in rows]

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """Rank `src`'s value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self.pulse.waiting("broadcast"):
            dist.broadcast_object_list(box, src=src, group=self.control)  # Collective:
        return box[0]

    def max_int(self, value: int) -> int:
        """The largest of all ranks' values."""
        self.pulse.beat()
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        with self.pulse.waiting("agreement"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)  # Collective:
        return int(tensor)

    def any(self, flag: bool) -> bool:
        """True when any rank says so."""
        return bool(self.max_int(int(flag)))

    @property
    def patient(self) -> AbstractContextManager[None]:
        """A context in which ranks wait for each other as long as at the start; must end with an agreement."""
        return nullcontext() if self.timeouts is None else self.timeouts.patient()

    def settle(self) -> None:
        """The first step is done: from now on ranks wait for each other for a short time only."""
        if self.timeouts is not None:
            self.timeouts.settle()

    def explained(self, error: Exception) -> Exception:
        """An error as a person wants it: of a broken connection, which rank was lost."""
        return error if self.health is None else self.health.explained(error)

    @contextmanager
    def collectively(self, what: str) -> Iterator[None]:
        """Run the body on every rank; if any rank raises, all do: the others a PeerError with the same exit code.

        The body must not contain a collective that a failing rank would miss.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as exc:
            error = exc
        self._raise_together(error, what)

    def _raise_together(self, error: Exception | None, what: str) -> None:
        # One number settles the usual case, in the logarithm of the ranks; reports go round the whole ring.
        if self.any(error is not None) and self.size > 1:
            own = None if error is None else (str(error) or repr(error), exit_code_of(error))
            reports = self.all_gather_object(own)
            if error is None:
                for rank, report in enumerate(reports):
                    if report is not None:
                        raise PeerError(f"{what}: rank {rank}: {report[0]}", report[1])
        if error is not None:
            raise error

    def on_main(self, function: Callable[[], T], what: str = "on rank 0") -> T:
        """Rank 0 calls `function`; all ranks get its result, or its error."""
        result: T | None = None
        with self.collectively(what):
            if self.is_main:
                result = function()
        return self.broadcast_object(result)  # type: ignore[return-value]

    def wait_for(self, is_done: Callable[[float], bool], should_stop: Callable[[], bool] | None = None) -> None:
        """Return when `is_done(seconds)`, which waits for at most that long, has been true on every rank.

        However long that takes: ranks meet in rounds that are shorter than what a collective may take.
        Raises StoppedEarly on all ranks when `should_stop` is true on one while another waits.
        """
        round_s = min(_LONGEST_ROUND_S if should_stop is None else _ASKING_ROUND_S, self.timeout_s / 4)
        while self.any(not is_done(round_s)):  # Collective:
            if should_stop is not None and self.any(should_stop()):  # Collective:
                raise StoppedEarly

    def on_main_at_length(
        self, function: Callable[[], T], what: str = "on rank 0", should_stop: Callable[[], bool] | None = None
    ) -> T:
        """`on_main` for what may take longer than a collective may; `function` runs in a thread of its own.

        Raises StoppedEarly on all ranks, and leaves that thread to itself, when one is asked to stop.
        """
        errand = Errand(function) if self.is_main else None
        self.wait_for(lambda seconds: errand is None or errand.is_done(seconds), should_stop)
        return self.on_main(lambda: errand.result(), what)  # type: ignore[union-attr]


class Errand(Generic[T]):
    """A function in a thread of its own, whose result or error is fetched later."""

    def __init__(self, function: Callable[[], T], name: str = "errand"):
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, args=(function,), name=name, daemon=True).start()

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._future.set_result(function())
        except BaseException as error:
            self._future.set_exception(error)

    def is_done(self, within_s: float) -> bool:
        """Whether it has come back, after at most `within_s`."""
        return bool(wait([self._future], within_s).done)

    def result(self) -> T:
        """What the function returned or raised."""
        return self._future.result()


def exit_code_of(error: BaseException) -> int:
    """The exit code an error carries; 1 for what nobody foresaw."""
    return getattr(error, "exit_code", EXIT_FAILED)


@contextmanager
def session(cluster: ClusterConfig, settings: Mapping[str, Any] | None = None) -> Iterator[World]:
    """Join the other ranks and leave them on every path. Raises ConfigError when they do not all come.

    settings: by name, what must be the same on all ranks.
    """
    launch = read_launch(os.environ)
    device, problem = _try_device(cluster, launch)
    backend = cluster.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    world = World(launch.rank, launch.size, launch.local_rank, launch.local_size, device, backend, launch.launcher)
    if launch.size == 1:
        if problem:
            raise ConfigError(problem)
        with _alone(world, cluster):
            yield world
        return
    _allow_connections(launch.size)
    settings = settings or {}
    store = open_store(launch, cluster)
    roll, fresh = call_roll(store, launch, cluster, make_card(launch, device, backend, settings, problem), settings)
    if launch.warning:
        roll = replace(roll, warnings=(*roll.warnings, launch.warning))
    world = replace(world, roll=roll, timeout_s=cluster.dist_timeout_s)
    limits = limits_of(cluster)
    first_local = launch.rank - launch.local_rank
    timeouts = Timeouts(limits)
    local = range(first_local, min(first_local + launch.local_size, launch.size))
    health = Health(launch.rank, launch.size, local, world.pulse, timeouts, limits.stall_s)
    health.join(fresh)
    try:
        health.start(timeouts.groups)
        groups = _process_groups(backend, fresh, launch, device, timeouts)
        # Twice: an error inside must be known to the others before the groups are left.
        with watched(health), groups as control, watched(health):
            # A store that is gone already has gone with rank 0, which may have had nothing to do.
            with suppress(*STORE_ERRORS):
                health.greet_mates()
            yield replace(world, control=control, timeouts=timeouts, health=health)
    finally:
        # Order matters: it still watches while the groups are left, which may hang.
        health.stop()


def _allow_connections(size: int) -> None:
    """The usual limit of 1024 open files is too low where each of many ranks has connections to this one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + 4 * size
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


@contextmanager
def _alone(world: World, cluster: ClusterConfig) -> Iterator[None]:
    """A world of one has nobody to wait for but its own loader."""
    limits = limits_of(cluster)
    health = Health(0, 1, range(1), world.pulse, Timeouts(limits), limits.stall_s)
    health.join(dist.HashStore())
    health.start([])
    try:
        yield
    finally:
        health.stop()


@contextmanager
def _process_groups(
    backend: str, store: dist.Store, launch: Launch, device: torch.device, timeouts: Timeouts
) -> Iterator[dist.ProcessGroup]:
    """Joins the groups of all ranks, and leaves them on every path. Yields the one on the host."""
    timeout = timedelta(seconds=timeouts.current_s)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("torch", store),
        rank=launch.rank,
        world_size=launch.size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )
    try:
        everyone = dist.group.WORLD
        assert everyone is not None
        control: Any = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else everyone
        timeouts.groups += [everyone] if control is everyone else [everyone, control]
        yield control
    finally:
        dist.destroy_process_group()


def _try_device(cluster: ClusterConfig, launch: Launch) -> tuple[torch.device, str]:
    """The device, or a substitute and why there is none: the other ranks must hear of it."""
    try:
        return pick_device(cluster, launch), ""
    except ConfigError as error:
        return torch.device("cpu"), str(error)


def pick_device(cluster: ClusterConfig, launch: Launch) -> torch.device:
    """The device of this rank. Raises ConfigError when there is no such one."""
    wanted = cluster.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise ConfigError("--device cuda, but no GPU is visible; --device cpu trains on the CPU")
    # Slurm may show each task one GPU only; then every local rank uses index 0.
    if visible > 1 and launch.local_rank >= visible:
        raise ConfigError(
            f"local rank {launch.local_rank}, but {visible} GPUs are visible: more tasks than GPUs on this node "
            "(ntasks-per-node, --nproc-per-node)"
        )
    device = torch.device("cuda", launch.local_rank if visible > 1 else 0)
    torch.cuda.set_device(device)
    return device
