"""`python -m scripts.report_run RUN [RUN ...]`: one or several runs as one HTML page that needs no network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.config import ClusterConfig
from training.distributed import session
from training.errors import ConfigError, UserError
from training.leave import leave
from training.run_report import write_report
from training.run_report.selection import ExampleOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page, and prints where it is. Returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.checkpoint and len(args.runs) > 1:
            raise ConfigError("--checkpoint is one run's; several take their newest")
        options = ExampleOptions(args.checkpoint, args.examples_data, args.num_examples, args.examples_pool)
        with session(ClusterConfig(device=args.device)) as world:
            print(write_report(args.runs, args.output or args.runs[0] / "report.html", options, world))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.report_run", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder, complete or still running")
    add("--output", type=Path, help="page to write (default: report.html in the first run's folder)")
    add("--checkpoint", help="weights that examples are made with (default: the run's newest checkpoint)")
    add(
        "--examples-data",
        metavar="NAME_OR_URL",
        help="a set of the run's by its name, or pairs in any form of --train-data (default: --val-data and the first "
        "of --zeroshot-data)",
    )
    add("--num-examples", type=_whole, default=8, help="examples of each kind; 0 leaves the model out (default: 8)")
    add("--examples-pool", type=_positive, default=1000, help="first samples of a set to search (default: 1000)")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"))
    return parser


def _whole(word: str) -> int:
    number = int(word)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{word} is negative")
    return number


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is less than 1")
    return number


if __name__ == "__main__":
    leave(main())
