"""`python -m scripts.benchmark_growth`: what a rank pays as the world grows, at a fixed batch of its own.

1 to 8 ranks are real gloo processes on this machine; larger worlds are rank 0 on PyTorch's fake process group,
whose collectives cost nothing: their times are those of the rank's own work. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from data import LaneCursor, LoaderConfig, Position, build_train_loader, synthetic_shards
from data.order import Order, lanes_per_rank, schedule_rows
from training.config import ClusterConfig, RunConfig, TrainConfig
from training.distributed import World, session
from training.dry_run import pretended_world
from training.footprint import Footprint
from training.leave import leave
from training.losses import contrastive_loss

REAL, FAKE = (1, 2, 4, 8), (64, 512, 4096)
BATCH, EMBED_DIM, NUM_SHARDS = 64, 256, 100_000
REPEATS = 5
COLUMNS = {
    "join ms": "roll call and process group",
    "loss ms": "loss and its gradient",
    "loss MiB": "most memory alive in them, beyond the features",
    "moved MiB": "of this rank's tensors in the loss's collectives",
    "lanes": "of the whole run",
    "order us": "a step's schedule, and the next segment of every lane of the rank",
    "loader ms": "construction of the loader",
    "agree ms": "one agreement of all ranks (`World.collectively`)",
    "gather ms": "every rank's data position on rank 0 (larger worlds: reading the messages of all)",
    "position ms": "merging them and writing the JSON",
    "position MiB": "size of the JSON",
    "resume ms": "reading it back",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures world after world and prints one row for each. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_growth", description=__doc__)
    parser.add_argument("--real", type=int, nargs="*", default=REAL, help="worlds of gloo processes")
    parser.add_argument("--fake", type=int, nargs="*", default=FAKE, help="worlds of which only rank 0 exists")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the same for every world, however many ranks share the machine
    print(f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores;")
    print(f"{BATCH} rows a rank, embedding {EMBED_DIM}, {NUM_SHARDS} shards, one thread. Best of {REPEATS}.\n")
    print("| ranks | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for size in args.real:
        print(_row(f"{size}", real_ranks(size)), flush=True)
    for size in args.fake:
        print(_row(f"{size} (fake)", fake_rank(size)), flush=True)
    print("\n" + "\n".join(f"- {name}: {meaning}." for name, meaning in COLUMNS.items()))
    return 0


def _row(name: str, values: dict[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{values[column]:,.4g}" for column in COLUMNS) + " |"


def real_ranks(size: int) -> dict[str, float]:
    """Rank 0's figures of `size` gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (size, port, queue), nprocs=size)  # type: ignore[no-untyped-call]
    return queue.get()


def _rank(rank: int, size: int, port: int, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    started = time.perf_counter()
    with session(ClusterConfig(device="cpu")) as world:
        joined_s = time.perf_counter() - started
        values = measure(world, _own_position(world.size, rank)) | {"join ms": 1e3 * joined_s}
    if rank == 0:
        queue.put(values)
    leave(0)


def fake_rank(size: int) -> dict[str, float]:
    """Rank 0's figures in a world that is pretended."""
    run = RunConfig(dry_run=True, dry_run_world_size=size)
    started = time.perf_counter()
    with pretended_world(TrainConfig(run=run, cluster=ClusterConfig(device="cpu"))) as world:
        joined_s = time.perf_counter() - started
        return measure(world, None) | {"join ms": 1e3 * joined_s}


def measure(world: World, own: Position | None) -> dict[str, float]:
    """All columns; `own` position of this rank where the others exist."""
    values = _loss(world) | _order(world) | _loader(world)
    values["agree ms"] = 1e3 * _seconds(lambda: _agree(world))
    return values | _positions(world, own)


def _agree(world: World) -> None:
    with world.collectively("nothing"):
        pass


def _loss(world: World) -> dict[str, float]:
    generator = torch.Generator().manual_seed(world.rank)
    features = torch.nn.functional.normalize(torch.randn(2, BATCH, EMBED_DIM, generator=generator), dim=-1)
    image, text = (rows.requires_grad_() for rows in features.unbind())
    scale = torch.tensor(20.0, requires_grad=True)

    def step() -> None:
        contrastive_loss(image, text, scale).backward()

    with Footprint() as footprint:
        step()
    return {
        "loss ms": 1e3 * _seconds(step),
        "loss MiB": footprint.peak_bytes / 2**20,
        "moved MiB": sum(footprint.collective_bytes.values()) / 2**20,
    }


def _order(world: World) -> dict[str, float]:
    lanes = lanes_per_rank(BATCH)
    order = Order(0, lanes * world.size, NUM_SHARDS, counts=(10_000,) * NUM_SHARDS)
    order.segment(0, 0, 0)  # the epoch's table, once in an epoch
    taken = np.zeros(lanes, dtype=np.int64)

    def step() -> None:
        schedule_rows(taken, BATCH)
        for lane in range(lanes):
            order.segment(lane, 0, 1)

    return {"lanes": float(lanes * world.size), "order us": 1e6 * _seconds(step)}


def _loader_config() -> LoaderConfig:
    source, sizes = synthetic_shards(NUM_SHARDS * 1000)
    return LoaderConfig(
        sources=(source,), sizes=sizes, dataset_type="synthetic", batch_size=BATCH, image_size=(32, 32),
        num_samples=NUM_SHARDS * 1000,
    )  # fmt: skip


def _loader(world: World) -> dict[str, float]:
    config = _loader_config()
    return {"loader ms": 1e3 * _seconds(lambda: build_train_loader(config, _no_tokens, world.rank, world.size).close())}


def _no_tokens(captions: list[str]) -> torch.Tensor:
    return torch.zeros(len(captions), 1, dtype=torch.int64)


def _own_position(size: int, rank: int) -> Position:
    lanes = lanes_per_rank(BATCH)
    cursors = {rank * lanes + lane: LaneCursor(3, 40, 4000, 512 * 977 * lane, 120, 37, 123456) for lane in range(lanes)}
    return Position(lanes * size, 1 << 20, 0, {"shards": "x" * 12}, cursors)


def _positions(world: World, own: Position | None) -> dict[str, float]:
    if own is not None:
        mine = own
        gather_s = _seconds(lambda: world.gather_object(mine.compact()))
        parts = world.gather_object(mine.compact()) or [mine]
    else:
        messages = [_message(_own_position(world.size, rank)) for rank in range(world.size)]
        gather_s = _seconds(lambda: [_read(message) for message in messages])
        parts = [_read(message) for message in messages]
    if not world.is_main:
        return {}
    text = json.dumps(Position.merge(parts).to_json())
    return {
        "gather ms": 1e3 * gather_s,
        "position ms": 1e3 * _seconds(lambda: json.dumps(Position.merge(parts).to_json())),
        "position MiB": len(text) / 2**20,
        "resume ms": 1e3 * _seconds(lambda: Position.from_json(json.loads(text))),
    }


def _message(position: Position) -> bytes:
    return pickle.dumps(position.compact())


def _read(message: bytes) -> Position:
    return pickle.loads(message)


def _seconds(work: Callable[[], Any]) -> float:
    """The shortest of several times of `work`: what else the machine does only ever adds."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
