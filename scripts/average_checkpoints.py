"""`python -m scripts.average_checkpoints OUT CHECKPOINT ...`: one model out of many, as a new folder.

Uniform, `--greedy` (checkpoints are added by what they score, while that does not fall), or between a base model and
the average (`--base`, `--alpha`). With sets, on several ranks too under torchrun or Slurm. Ten models of any size
need no more memory than one needs to be evaluated, and without sets far less.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.evaluate import add_set_flags, data_config, eval_config
from training.config import ClusterConfig
from training.distributed import session
from training.errors import PeerError, UserError
from training.evaluation.exam import Exam
from training.leave import leave
from training.soup import SOUP_FILE, Soup, make_soup
from training.soup_recipe import SoupRecipe


def main(argv: Sequence[str] | None = None) -> int:
    """Averages, and prints what was chosen. Returns the exit code."""
    args = _parser().parse_args(argv)
    exam = Exam(sets=eval_config(args), data=data_config(args), batch_size=args.batch_size, precision=args.precision)
    try:
        with session(ClusterConfig(device=args.device)) as world:
            if world.is_main:
                logging.basicConfig(
                    level=logging.INFO, format="%(message)s"
                )  # scores take their time: each as it comes
            soup = make_soup(args.out, _recipe(args), exam, world)
            if world.is_main:
                print(report(args.out, soup))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except PeerError as error:
        return error.exit_code  # the rank that met the error has said so itself
    return 0


def report(out: Path, soup: Soup) -> str:
    """The tables of what was tried, and what is now where."""
    parts = [f"note: {note}" for note in soup.notes]
    if soup.candidates:
        rows = [
            (
                candidate.source,
                f"{candidate.score:.4f}",
                f"{candidate.soup_score:.4f}",
                "yes" if candidate.kept else "no",
            )
            for candidate in soup.candidates
        ]
        parts.append(_table((f"by {soup.metric}", "alone", "soup with it", "kept"), rows))
    if soup.metric and soup.mixes:
        mixed = [(f"{mix.alpha:g}", f"{mix.score:.4f}") for mix in soup.mixes]
        parts.append(_table(("alpha", f"{soup.metric}"), mixed))
    total = sum(member.weight for member in soup.members)
    shares = [(f"{member.weight / total:.4f}", member.source) for member in soup.members]
    parts.append(_table(("share", "checkpoint"), shares))
    parts.append(f"{out}: the {soup.method} average; {SOUP_FILE} there says how it came about")
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _recipe(args: argparse.Namespace) -> SoupRecipe:
    return SoupRecipe(
        candidates=tuple(args.checkpoints),
        weights=tuple(args.weights),
        greedy=args.greedy,
        base=args.base,
        alphas=tuple(args.alpha or ([0.5] if args.base else [1.0])),
        metric=args.metric,
        model=args.model,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.average_checkpoints", description=__doc__)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make: weights, their model, and soup.json")
    add(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="checkpoint folder, run folder (its newest), .safetensors, or OpenCLIP .pt",
    )
    add("--model", help="name or configuration file, where no checkpoint is a folder, which knows its own")
    add("--weights", type=float, nargs="+", default=[], help="how much each checkpoint counts (default: all alike)")
    add("--greedy", action="store_true", help="best first, each kept if the soup with it scores no worse")
    add("--base", metavar="CHECKPOINT", help="the model that the checkpoints were fine-tuned from")
    add(
        "--alpha",
        type=float,
        nargs="+",
        help="how far from --base (0) to the average (1); of several the best is written (default: 0.5)",
    )
    add("--metric", help="figure to choose by, e.g. val/imagenet-zeroshot-val-top1 (default: the first set's top-1)")
    add_set_flags(parser)
    return parser


if __name__ == "__main__":
    leave(main())
