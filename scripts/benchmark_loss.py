"""python -m scripts.benchmark_loss: our streamed loss beside OpenCLIP's local loss, in memory and time.

Each measurement is a process of its own that is rank 0 of a world which exists in name only: torch's fake process
group gives every collective its shapes and leaves out the exchange, so what is compared is one rank's arithmetic.
Rounds are interleaved, because other work on the machine must hit both alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SIDES = ("ours", "openclip")
MIB = 2**20
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def build_loss(side: str, world: int) -> Loss:
    """The loss of one side, as its trainer calls it for --local-loss --gather-with-grad."""
    if side == "ours":
        from training.losses import contrastive_loss

        return contrastive_loss
    from open_clip.loss import ClipLoss

    return ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=world)


def measure(side: str, rows: int, world: int, embed: int) -> dict[str, float]:
    """One forward and backward pass in this process, after a small one that wakes the libraries up."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = build_loss(side, world)
    _pass(loss, 8, embed, device)
    image, text, scale = _inputs(rows, embed, device)
    start = _memory(device)
    wall, cpu = time.perf_counter(), time.process_time()
    value = loss(image, text, scale)
    value.backward()
    last = float(value.detach())  # Host sync: the end of the work.
    found = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    found |= {"mib": (_peak(device) - start) / MIB, "loss": last}
    dist.destroy_process_group()
    return found


def _pass(loss: Loss, rows: int, embed: int, device: torch.device) -> None:
    loss(*_inputs(rows, embed, device)).backward()


def _inputs(rows: int, embed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, embed, device=device), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(50.0, device=device, requires_grad=True)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(rounds: int, rows: int, world: int, embed: int) -> dict[str, list[dict[str, float]]]:
    """`rounds` measurements of each side, in turns, the first side changing with each round."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            flags = ["--side", side, "--rows", str(rows), "--world", str(world), "--embed", str(embed)]
            command = [sys.executable, "-m", "scripts.benchmark_loss", *flags]
            # OpenCLIP 3.3.0 calls a function that newer torch warns about.
            env = os.environ | {"PYTHONWARNINGS": "ignore"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    _check(found, world)
    return found


def _check(found: dict[str, list[dict[str, float]]], world: int) -> None:
    """Both saw the same logits: every column is there `world` times, and the fake group does not add our sums up."""
    difference = found["openclip"][0]["loss"] - found["ours"][0]["loss"]
    assert abs(difference - math.log(world) / 2) < 1e-4, f"the losses differ by {difference}"


def report(found: dict[str, list[dict[str, float]]], rows: int, world: int, embed: int) -> str:
    """The comparison as Markdown."""
    lines = [
        f"B = {rows} rows of a rank, G = {rows * world} columns, D = {embed}, fp32, forward and backward, "
        f"{len(found[SIDES[0]])} rounds; {environment()}.",
        "",
        "| | ours | OpenCLIP 3.3.0, local loss | ratio of medians | of pairs, least to most |",
        "|---|---|---|---|---|",
    ]
    for name, key, digits in (
        ("peak extra memory, MiB", "mib", 0),
        ("CPU time, s", "cpu_s", 2),
        ("wall time, s", "wall_s", 2),
    ):
        ours, theirs = ([measured[key] for measured in found[side]] for side in SIDES)
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        lines.append(
            f"| {name} | {_spread(ours, digits)} | {_spread(theirs, digits)} "
            f"| {statistics.median(ours) / statistics.median(theirs):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |"
        )
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def environment() -> str:
    """What the figures depend on."""
    if torch.cuda.is_available():
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads on {_cpu_name()}"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Print the comparison, and write it to --out."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_loss", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="B, samples of a rank (default: 4096)")
    parser.add_argument("--world", type=int, default=8, help="ranks; G is rows times ranks (default: 8)")
    parser.add_argument("--embed", type=int, default=512, help="D, embedding size (default: 512)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (default: 5)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--side", choices=SIDES, help="measure one side once, in this process, as one line of JSON")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.rows, args.world, args.embed)))
        return
    print(f"OpenCLIP {metadata.version('open_clip_torch')}; {environment()}", flush=True)
    text = report(run(args.rounds, args.rows, args.world, args.embed), args.rows, args.world, args.embed)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
