"""`python -m scripts.plot_run RUN [RUN ...]`: the curves of one or several runs as one picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.errors import ConfigError
from training.plots import plot_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Draws, and prints where the picture is. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.plot_run", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, with metrics.jsonl in it")
    parser.add_argument("--output", type=Path, help="PNG to write (default: curves.png in the first run's folder)")
    args = parser.parse_args(argv)
    try:
        print(plot_runs(args.runs, args.output or args.runs[0] / "curves.png"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
