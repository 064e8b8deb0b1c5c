"""`python -m scripts.benchmark_checkpoint`: what a checkpoint costs beside the bare copy and the bare write.

The state is a model's weights and two moments. Stall: `Checkpointer.save` until it returns, beside a plain copy of the
same tensors into memory that exists, taken just before. Write: `write_checkpoint`, fsync and checksums included, beside
a sequential write of the same bytes in the same pieces with fsync, on the same disk. Sides take turns. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import models
from training.checkpoint import Checkpointer
from training.checkpoint_content import MODEL_FILE, OPTIMIZER_FILE, Progress
from training.checkpoint_files import CHUNK_BYTES, write_checkpoint
from training.distributed import World
from training.host_copy import HostCopy

State = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock, and of this thread's CPU time."""

    wall: float
    cpu: float


Times = dict[str, list[Taken]]
# Side -> the bare work beside it.
BESIDE = {
    "first save, stall": "plain copy before it",
    "later save, stall": "plain copy before that",
    "checkpoint, write": "raw write",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_checkpoint", description=__doc__)
    parser.add_argument("--model", default="ViT-B-32", help="whose weights and moments are saved")
    parser.add_argument(
        "--folder", default=None, help="on the disk to measure; the system's folder for temporary files"
    )
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # CPU time is this thread's
    state = build_state(args.model)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark-checkpoint-") as folder:
        times = measure(state, Path(folder), args.rounds)
    report(times, num_bytes(state), args.model)
    return 0


def build_state(model: str) -> State:
    """Weights and two moments under the names that a run saves."""
    weights = models.create_model(model).state_dict()
    moments = {
        f"{slot}/{name}": torch.rand_like(w) for slot in ("exp_avg", "exp_avg_sq") for name, w in weights.items()
    }
    return {MODEL_FILE: weights, OPTIMIZER_FILE: moments}


def num_bytes(state: State) -> int:
    """Of all tensors."""
    return sum(t.numel() * t.element_size() for tensors in state.values() for t in tensors.values())


def measure(state: State, folder: Path, rounds: int) -> Times:
    """All sides in turn, `rounds` times."""
    times: Times = {side: [] for pair in BESIDE.items() for side in reversed(pair)}
    target = HostCopy()
    target.reserve(state)
    writes = {
        "raw write": lambda: raw_write(state, folder / "raw"),
        "checkpoint, write": lambda: write_checkpoint(folder / "epoch_1", state, {}, step=1, epoch=1),
    }
    for number in range(rounds):
        save_twice(state, folder / "checkpoints", target, times)
        _clear(folder)
        # Whoever comes first finds the memory and the disk as the saves have left them.
        for side in list(writes)[:: 1 if number % 2 else -1]:
            times[side].append(_taken(writes[side]))
            _clear(folder)
    return times


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def plain_copy(state: State, target: HostCopy) -> None:
    """What no snapshot can do without."""
    for file, tensors in state.items():
        for key, tensor in tensors.items():
            target.buffer(file, key, tensor).copy_(tensor)


def save_twice(state: State, folder: Path, target: HostCopy, times: Times) -> None:
    """Stalls of a run's first save, after `reserve`, and of a later one; what is written behind them is waited for."""
    with Checkpointer(folder, World()) as checkpointer:
        checkpointer.reserve(state[MODEL_FILE], state[OPTIMIZER_FILE])
        for step, side in enumerate(("first save, stall", "later save, stall")):
            checkpointer.wait()
            times[BESIDE[side]].append(_taken(lambda: plain_copy(state, target)))
            times[side].append(_taken(partial(save, checkpointer, state, step)))


def save(checkpointer: Checkpointer, state: State, step: int) -> None:
    """As a run does, without its documents."""
    checkpointer.save(
        f"step_{step:09d}",
        progress=Progress(step, 0, step),
        model_state=state[MODEL_FILE],
        optimizer_state=state[OPTIMIZER_FILE],
        data_position={},
        config={},
        model_config={},
    )


def raw_write(state: State, folder: Path) -> None:
    """The same bytes, one file after the other, and nothing else."""
    folder.mkdir()
    for file, tensors in state.items():
        with (folder / file).open("wb", buffering=1 << 20) as out:
            for tensor in tensors.values():
                raw = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
                for at in range(0, len(raw), CHUNK_BYTES):
                    out.write(raw[at : at + CHUNK_BYTES])
            out.flush()
            os.fsync(out.fileno())


def report(times: Times, size: int, model: str) -> None:
    """Markdown: medians with least and most, and the ratio to the bare work within a round."""
    rounds = len(times["raw write"])
    print(f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores;")
    print(f"{model} with two moments, {size / 2**20:,.0f} MiB, {rounds} rounds. Median (least to most).\n")
    print("| side | seconds | CPU seconds | MiB/s | time against the bare work | CPU time against it |")
    print("|---|---|---|---|---|---|")
    for side, taken in times.items():
        wall, cpu = [one.wall for one in taken], [one.cpu for one in taken]
        bare = times[BESIDE[side]] if side in BESIDE else []
        cells = [_spread(wall, ".2f"), _spread(cpu, ".2f"), _spread([size / 2**20 / one for one in wall], ",.0f")]
        cells += [_ratio(wall, [one.wall for one in bare]), _ratio(cpu, [one.cpu for one in bare])]
        print(f"| {side} | {' | '.join(cells)} |")
    print("\nThe aims: a stall of at most 1.3 times the copy, a write of at most 1.11 times the raw one.")


def _ratio(ours: list[float], bare: list[float]) -> str:
    return _spread([a / b for a, b in zip(ours, bare, strict=True)], ".2f", "**") if bare else ""


def _spread(values: list[float], spec: str, mark: str = "") -> str:
    return f"{mark}{median(values):{spec}}{mark} ({min(values):{spec}} to {max(values):{spec}})"


def _taken(work: Callable[[], object]) -> Taken:
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return Taken(time.perf_counter() - wall, time.thread_time() - cpu)


if __name__ == "__main__":
    sys.exit(main())
