"""`python -m scripts.demo`: draws a data set, trains a small CLIP on it, and tells what it can do (`make demo`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.demo_scenes import SHAPES, combinations, draw_once, held_out
from training.errors import EXIT_DONE, EXIT_PREEMPTED
from training.main import main as train
from training.plots import plot_runs, read_run

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "recipes" / "demo.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Goes on where an earlier call stopped. Further flags are the trainer's. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the data set and the run")
    args, further = parser.parse_known_args(argv)
    run, data = args.runs / "demo", args.runs / "demo-data"
    print(f"Data set: {data} ({'drawn now' if draw_once(data) else 'already drawn'})", flush=True)
    code = train([*_flags(args.runs, data), *further])
    if code == EXIT_DONE:
        _tell(run)
    elif code == EXIT_PREEMPTED:
        print("Stopped, with everything saved. The same command goes on from here.")
    return code


def _flags(runs: Path, data: Path) -> list[str]:
    return [
        *("--config", str(RECIPE), "--resume", "latest", "--logs", str(runs), "--name", "demo"),
        *("--train-data", f"{data}/train/{{00000..00005}}.tar", "--val-data", f"{data}/val/00000.tar"),
        *("--zeroshot-data", f"demo={data}/eval"),
    ]


def _tell(run: Path) -> None:
    picture = plot_runs([run], run / "curves.png")
    figures = {name: values[-1] for name, (_, values) in read_run(run).curves.items() if name.startswith("val/")}
    classes, unseen = len(combinations()), len(held_out())
    accuracy, first = figures["val/demo-zeroshot-top1"], "val/{}_R@1".format
    print(
        f"\nZero-shot accuracy on held-out images: {accuracy:.1%} (chance {1 / classes:.0%}: one of {classes} classes)."
    )
    print(f"  Training never showed their {unseen} combinations; knowing the colour alone gives {1 / len(SHAPES):.0%}.")
    print(
        f"Retrieval, first of {figures['val/num_samples']:.0f}: image to text {figures[first('image_to_text')]:.1%}, ",
        end="",
    )
    print(f"text to image {figures[first('text_to_image')]:.1%}.")
    print(f"Run folder: {run.resolve()}")
    print(f"Its curves: {picture.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
