"""`python -m scripts.profile_model NAME ...`: parameters, GMACs and activations of models, tower by tower.

The costs of one forward pass, counted from shapes: the largest models take no memory. What counts, and why the
figures agree with the published ones, is said in `models/profile.py`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from models import ConfigError, config_with, load_model_config
from models.profile import Cost, ModelProfile, profile_model
from scripts.arguments import positive

_COLUMNS = ("model", "pixels", "tokens", "tower", "Mparams", "GMACs", "Mact", "Mact fused")


def main(argv: Sequence[str] | None = None) -> int:
    """Counts and prints. Returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        configs = [
            config_with(load_model_config(name), image_size=args.image_size, context_length=args.context_length)
            for name in args.models
        ]
        profiles = [profile_model(config, args.batch_size) for config in configs]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(_FORMATS[args.format](profiles))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.profile_model",
        description=__doc__,
        epilog="Mact: million numbers that convolutions and matrix products put out; fused: without attention maps",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="NAME", help="a model, or a JSON or YAML file in OpenCLIP's schema")
    add("--image-size", type=positive, nargs="+", help="pixels: one side, or height and width (default: the model's)")
    add("--context-length", type=positive, help="tokens of a text (default: the model's)")
    add("--batch-size", type=positive, default=1, help="images, and texts, of the forward pass (default: 1)")
    form = parser.add_mutually_exclusive_group()
    for name, what in (("markdown", "a Markdown table"), ("csv", "CSV"), ("json", "JSON, in whole numbers")):
        form.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=what)
    parser.set_defaults(format="table")
    return parser


def _rows(profiles: list[ModelProfile]) -> list[tuple[str, ...]]:
    return [_row(profile, cost) for profile in profiles for cost in (*profile.towers, profile.total)]


def _row(profile: ModelProfile, cost: Cost) -> tuple[str, ...]:
    height, width = profile.image_size
    figures = (
        cost.parameters / 1e6,
        cost.macs / 1e9,
        cost.activations / 1e6,
        (cost.activations - cost.attention_maps) / 1e6,
    )
    about = (profile.name, f"{height}x{width}", str(profile.context_length), cost.tower)
    return (*about, *(f"{figure:.2f}" for figure in figures))


def _table(profiles: list[ModelProfile]) -> str:
    """Columns aligned: words to the left, figures to the right."""
    rows = [_COLUMNS, *_rows(profiles)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            word.ljust(width) if at in (0, 3) else word.rjust(width)
            for at, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines)


def _markdown(profiles: list[ModelProfile]) -> str:
    head = ("| " + " | ".join(_COLUMNS) + " |", "|---|--:|--:|---|--:|--:|--:|--:|")
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in _rows(profiles))])


def _csv(profiles: list[ModelProfile]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *_rows(profiles)])
    return text.getvalue().rstrip("\n")


def _json(profiles: list[ModelProfile]) -> str:
    return json.dumps([asdict(profile) for profile in profiles], indent=1)


_FORMATS = {"table": _table, "markdown": _markdown, "csv": _csv, "json": _json}


if __name__ == "__main__":
    sys.exit(main())
