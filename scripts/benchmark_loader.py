"""`python -m scripts.benchmark_loader`: our training loader against OpenCLIP 3.3.0's, on the same shards.

All sides live through one run and take their rounds in turn, so that a machine's moods strike them alike; the
unit is samples per CPU second of the loading processes, workers included. OpenCLIP's trainer needs an older
webdataset than ours, so its side runs under an interpreter of its own (--openclip-python).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.benchmark_pictures import KINDS, PictureKind, write_shards

_ROOT = Path(__file__).resolve().parents[1]
_BATCH = 64
_PICTURES = 48  # different ones; more would only take longer to draw
_SHARDS = 8
_TAR_ROUND = 4  # times as many samples as in a round of the loaders: reading is so much faster
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# What the allocator of a loading process comes to by itself after its first large picture. A process that only reads
# tars never gets there, and would measure how it gives memory back and asks for it again.
_NO_TRIMMING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 28), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
_RECIPE = (
    "python3.11 -m venv oc && oc/bin/pip install 'open_clip_torch[training]==3.3.0' webdataset==0.2.86, "
    "with the torch, torchvision and pillow of this environment"
)


@dataclass(frozen=True)
class Side:
    """Who is measured: a name for the tables, the interpreter, and the arguments of `scripts.benchmark_sides`."""

    name: str
    python: str
    arguments: tuple[str, ...]

    @property
    def only_reads(self) -> bool:
        """Whether it stops at the bytes of the samples."""
        return self.arguments[0].endswith("-tar")


@dataclass
class Measured:
    """What a side answered, one entry a round, and the versions it runs."""

    versions: dict[str, str] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Samples per CPU second of each round."""
        return [answer["samples"] / answer["cpu_s"] for answer in self.rounds]

    @property
    def median(self) -> float:
        """Of the rates."""
        return statistics.median(self.rates)

    def share_outside(self) -> list[float]:
        """Of each round, the part of the CPU time that is neither JPEG decode nor resize."""
        return [1 - (answer["decode"] + answer["resize"]) / answer["cpu_s"] for answer in self.rounds]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints Markdown, and writes it to --out. Returns the exit code."""
    args = _parser().parse_args(argv)
    kinds = [kind for kind in KINDS if kind.short in args.short_sides]
    with _folder(args.shards_folder) as folder:
        for kind in kinds:
            _make_shards(folder / str(kind.short), kind, args)
        loaders = {kind: measure(_loader_sides(args, _braces(folder, kind)), args) for kind in kinds}
        tars = {kind: measure(_tar_sides(args, _braces(folder, kind)), args, _TAR_ROUND) for kind in kinds}
    text = "\n".join(_report(args, loaders, tars))
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_loader", description=__doc__)
    add = parser.add_argument
    add("--openclip-python", help=f"an interpreter with OpenCLIP's trainer: {_RECIPE}")
    add("--rounds", type=int, default=5)
    add("--samples", type=int, default=2048, help="of each side in a round; with fewer, blocks read ahead show")
    add("--warmup", type=int, default=4608, help="samples before the first round; OpenCLIP shuffles 5,000")
    add("--workers", type=int, default=1)
    add("--short-sides", type=int, nargs="+", default=[kind.short for kind in KINDS], help="pictures, by short side")
    add("--per-shard", type=int, default=150, help="samples in each of the shards that are made")
    add("--shards-folder", type=Path, help="where shards are kept for the next run; default: a temporary folder")
    add("--out", type=Path, help="also write the Markdown to this file")
    return parser


def measure(sides: Sequence[Side], args: argparse.Namespace, times: int = 1) -> dict[str, Measured]:
    """The rounds of each side, by its name, taken in turn; `times` as many samples as a round of the loaders has."""
    results = {side.name: Measured() for side in sides}
    with contextlib.ExitStack() as stack:
        processes = {side.name: stack.enter_context(_started(side)) for side in sides}
        for name, process in processes.items():
            results[name].versions = _answer(process)["versions"]
        for process in processes.values():
            _ask(process, args.warmup)
        for _ in range(args.rounds):
            for name, process in processes.items():
                results[name].rounds.append(_ask(process, args.samples * times))
    return results


@contextlib.contextmanager
def _started(side: Side) -> Iterator[subprocess.Popen[str]]:
    command = [side.python, "-W", "ignore", "-m", "scripts.benchmark_sides", *side.arguments]
    environment = os.environ | _ENVIRONMENT | (_NO_TRIMMING if side.only_reads else {})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=_ROOT, env=environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _ask(process: subprocess.Popen[str], samples: int) -> dict[str, float]:
    assert process.stdin is not None
    process.stdin.write(f"{samples}\n")
    process.stdin.flush()
    return _answer(process)


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a side ended before its answer: {process.args}")
    return json.loads(line)


def _loader_sides(args: argparse.Namespace, shards: str) -> list[Side]:
    common = ("--shards", shards, "--batch-size", str(_BATCH), "--workers", str(args.workers))
    sides = [
        Side(f"ours, {decode}", sys.executable, ("clipyard", *common, "--image-decode", decode))
        for decode in ("exact", "fast")
    ]
    if args.openclip_python:
        sides.insert(0, Side("OpenCLIP", args.openclip_python, ("openclip", *common)))
    return sides


def _tar_sides(args: argparse.Namespace, shards: str) -> list[Side]:
    common = ("--shards", shards)
    sides = [
        Side("ours", sys.executable, ("clipyard-tar", *common)),
        Side("webdataset", sys.executable, ("webdataset-tar", *common)),
    ]
    if args.openclip_python:
        sides.append(Side("webdataset, OpenCLIP's", args.openclip_python, ("webdataset-tar", *common)))
    return sides


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="clipyard-benchmark-") as temporary:
        yield Path(temporary)


def _make_shards(folder: Path, kind: PictureKind, args: argparse.Namespace) -> None:
    """Shards of `kind`, unless they are there; read once, so that all sides find them in the page cache."""
    if not folder.exists():
        write_shards(folder, kind, _SHARDS, args.per_shard, _PICTURES)
    for path in folder.glob("*.tar"):
        path.read_bytes()


def _braces(folder: Path, kind: PictureKind) -> str:
    return f"{folder / str(kind.short)}/{{00000..{_SHARDS - 1:05d}}}.tar"


Results = dict[PictureKind, dict[str, Measured]]


def _report(args: argparse.Namespace, loaders: Results, tars: Results) -> Iterator[str]:
    yield from _environment(args, loaders, tars)
    yield "\n**Whole loader**, samples per CPU second: median (least to most) of the rounds.\n"
    if args.openclip_python:
        yield from _compared(loaders, "OpenCLIP")
    else:
        yield f"OpenCLIP's side is left out: no --openclip-python. One is made by: {_RECIPE}.\n"
        yield from _compared(loaders, "ours, exact")
    yield (
        "\n**Our CPU time outside JPEG decode and crop-and-resize**, share of the whole loader's: "
        "median (least to most).\n"
    )
    yield from _shares(loaders)
    yield "\n**Reading tars**, samples per CPU second: median (least to most).\n"
    yield from _compared(tars, "webdataset")


def _environment(args: argparse.Namespace, *results: Results) -> Iterator[str]:
    yield f"{datetime.date.today()}, {_cpu_model()}, {os.cpu_count()} cores; Python {platform.python_version()}."
    versions: dict[str, dict[str, str]] = {}
    for side in (side for result in results for sides in result.values() for side in sides.items()):
        versions[side[0]] = versions.get(side[0], {}) | side[1].versions
    for name, found in versions.items():
        yield f"- {name}: " + ", ".join(f"{package} {version}" for package, version in found.items())
    yield (
        f"\n{args.rounds} rounds of {args.samples} samples after {args.warmup}, {args.workers} worker(s), batches of "
        f"{_BATCH}, 224 pixels, default train transform, CLIP's tokenizer, resampled shards in the page cache."
    )


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _compared(results: Results, base: str) -> Iterator[str]:
    """A table: a row for each kind of picture, a column for each side with its ratio to `base`."""
    names = list(next(iter(results.values())))
    yield "| pictures | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for kind, sides in results.items():
        yield _row(kind, [_cell(sides[name], sides[base] if name != base else None) for name in names])


def _cell(side: Measured, base: Measured | None) -> str:
    rate = f"{side.median:,.0f} ({min(side.rates):,.0f} to {max(side.rates):,.0f})"
    return rate if base is None else f"{rate}, **{side.median / base.median:.2f}x**"


def _shares(results: Results) -> Iterator[str]:
    names = [name for name in next(iter(results.values())) if name.startswith("ours")]
    yield "| pictures | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for kind, sides in results.items():
        shares = [sides[name].share_outside() for name in names]
        cells = [f"{statistics.median(one):.1%} ({min(one):.1%} to {max(one):.1%})" for one in shares]
        yield _row(kind, cells)


def _row(kind: PictureKind, cells: list[str]) -> str:
    return f"| {kind.short} px, q{kind.quality}, {kind.kib} KiB | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
