"""`python -m scripts.make_demo_shards FOLDER`: draws the demo's data set as WebDataset shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.demo_scenes import DemoSize, draw_once


def main(argv: Sequence[str] | None = None) -> int:
    """Draws unless the folder is there already. Returns the exit code."""
    size = DemoSize()
    parser = argparse.ArgumentParser(prog="python -m scripts.make_demo_shards", description=__doc__)
    parser.add_argument("folder", type=Path, help="where train/, val/ and eval/ go")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures")
    parser.add_argument("--train", type=int, default=size.train, help="pairs to train on")
    parser.add_argument("--val", type=int, default=size.val, help="pairs for retrieval")
    parser.add_argument("--evaluation", type=int, default=size.evaluation, help="images of combinations held out")
    parser.add_argument("--shard", type=int, default=size.shard, help="samples a shard")
    parser.add_argument("--pixels", type=int, default=size.pixels, help="side of a picture")
    args = parser.parse_args(argv)
    wanted = DemoSize(args.train, args.val, args.evaluation, args.shard, args.pixels)
    if draw_once(args.folder, args.seed, wanted):
        print(f"drew {args.train} pairs into {args.folder}")
    else:
        print(f"{args.folder} is there already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
