"""`python -m scripts.benchmark_text`: forward and backward pass of a text tower with and without padding, side by side.

Captions have random words; their lengths in tokens, start and end included, are drawn from a log-normal
distribution with median 15.2 and sigma 0.48, clipped to 4 and the context length: 17 on average, as web
captions have. Rounds alternate between the two ways. CPU time is the more robust number on a shared machine.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import models
from models.text import TextTower

START, END = 49406, 49407
MEDIAN_TOKENS, SIGMA = 15.2, 0.48
# Rows of 77 tokens whose activations fit into the memory of a small machine; the cost is linear in rows.
PADDED_ROWS = 256


@dataclass(frozen=True)
class Times:
    """Of one pass forward and backward, in seconds."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Result:
    """One batch size of one tower."""

    model: str
    rows: int
    mean_tokens: float
    needed_share: float  # of the tokens that the tower without padding computes
    groups: int
    padded: list[Times]
    unpadded: list[Times]
    difference: float  # largest, of features of length 1

    def ratios(self, unit: str) -> list[float]:
        """Padded to unpadded, round by round."""
        return [getattr(a, unit) / getattr(b, unit) for a, b in zip(self.padded, self.unpadded, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints Markdown, and writes it where asked. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_text", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"], help="models whose text towers are measured")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 256], help="rows")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each way, after one to warm up")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 disturbs others least")
    parser.add_argument("--seed", type=int, default=0, help="of captions and weights")
    parser.add_argument("--out", type=Path, help="Markdown file to write as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    lines = [environment(args.threads), "", *HEADER]
    print("\n".join(lines), flush=True)
    for name in args.models:
        tower = build_tower(name, args.seed)
        for rows in args.batch_sizes:
            lines.append(row_of(measure(name, tower, rows, args.rounds, args.seed)))
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def build_tower(name: str, seed: int) -> TextTower:
    """The text tower of a model, freshly initialised."""
    config = models.load_model_config(name)
    torch.manual_seed(seed)
    return TextTower(config.text_cfg, config.embed_dim, config.quick_gelu)


def draw_captions(rows: int, context_length: int, seed: int) -> Tensor:
    """Token ids [rows, context_length] of captions whose lengths follow the distribution above."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(math.log(MEDIAN_TOKENS), SIGMA, rows)).round().clip(4, context_length).astype(int)
    tokens = random.integers(1, START, (rows, context_length))
    tokens[:, 0] = START
    tokens[np.arange(context_length) >= lengths[:, None]] = 0
    tokens[np.arange(rows), lengths - 1] = END
    return torch.from_numpy(tokens)


def measure(name: str, tower: TextTower, rows: int, rounds: int, seed: int) -> Result:
    """Both ways in turn, `rounds` times."""
    tokens = draw_captions(rows, tower.text_config.context_length, seed)
    plan = tower.plan_text(tokens)

    def padded() -> Iterator[Tensor]:
        return (tower(part) for part in tokens.split(PADDED_ROWS))

    def unpadded() -> Iterator[Tensor]:
        # Planning is part of the cost.
        yield tower(tokens, tower.plan_text(tokens))

    timed(tower, unpadded)
    pairs = [(timed(tower, padded), timed(tower, unpadded)) for _ in range(rounds)]
    (_, want), (_, got) = pairs[-1]
    return Result(
        model=name,
        rows=rows,
        mean_tokens=float((tokens != 0).sum()) / rows,
        needed_share=float((tokens != 0).sum()) / len(plan.index),
        groups=len(plan.groups.shapes),
        padded=[pair[0][0] for pair in pairs],
        unpadded=[pair[1][0] for pair in pairs],
        difference=float((got - want).abs().max()),
    )


def timed(tower: TextTower, run: Callable[[], Iterator[Tensor]]) -> tuple[Times, Tensor]:
    """One pass forward and backward of a whole batch, and its features at length 1."""
    tower.zero_grad(set_to_none=True)
    wall, cpu = time.perf_counter(), time.process_time()
    features = []
    for part in run():
        unit = torch.nn.functional.normalize(part, dim=-1)
        unit.sum().backward()
        features.append(unit.detach())
    return Times(time.perf_counter() - wall, time.process_time() - cpu), torch.cat(features)


HEADER = [
    "| text tower | batch | mean tokens | useful tokens | groups | padded, CPU s | without, CPU s "
    "| ratio, CPU (lowest to highest) | ratio, wall | largest difference |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def row_of(result: Result) -> str:
    """A line of the table: medians, with the spread of the ratio over the rounds."""
    cpu, wall = result.ratios("cpu_s"), result.ratios("wall_s")
    padded, unpadded = (statistics.median(t.cpu_s for t in times) for times in (result.padded, result.unpadded))
    return (
        f"| {result.model} | {result.rows} | {result.mean_tokens:.1f} | {result.needed_share:.0%} | {result.groups} "
        f"| {padded:.2f} | {unpadded:.2f} | {statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f}) "
        f"| {statistics.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f}) | {result.difference:.1e} |"
    )


def environment(threads: int) -> str:
    """What the numbers depend on besides the code."""
    return (
        f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, {cpu_name()}, "
        f"{threads} thread{'s' * (threads > 1)}, fp32"
    )


def cpu_name() -> str:
    """The processor as Linux names it, or as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
