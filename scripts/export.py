"""`python -m scripts.export --to openclip --to timm CHECKPOINT OUT`: a model for other libraries, checked there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import models
from models.export import TARGETS, check_export, export_model
from training.card import write_card
from training.checkpoint_content import MODEL_CONFIG_FILE
from training.errors import UserError
from training.evaluation.standalone import find_model


def main(argv: Sequence[str] | None = None) -> int:
    """Exports, and prints how far the features are apart. Returns the exit code."""
    args = _parser().parse_args(argv)
    targets = list(dict.fromkeys(args.to))
    try:
        name, weights = find_model(args.checkpoint, args.model)
        check_export(models.load_model_config(name), targets, args.out, args.overwrite)
        model = models.create_model(name, weights, force_quick_gelu=args.force_quick_gelu)
        agreements = export_model(model, targets, args.out, args.overwrite)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        write_card(args.out, model.config, num_parameters, targets, _checkpoint_folder(Path(weights)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for target, agreement in agreements.items():
        print(f"{args.out / target}: differs from the checkpoint by at most {agreement}")
    return 0


def _checkpoint_folder(weights: Path) -> Path | None:
    """The folder that knows what the weights are, if they lie in one."""
    folder = weights if weights.is_dir() else weights.parent
    return folder if (folder / MODEL_CONFIG_FILE).is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="checkpoint folder, run folder (its newest), .safetensors, or OpenCLIP .pt")
    add("out", type=Path, help="folder to make; each target has a folder of its own in it")
    add("--to", action="append", required=True, choices=TARGETS, help="may be given several times")
    add("--model", help="name or configuration file; a checkpoint folder knows its own")
    add("--force-quick-gelu", action="store_true", help="the weights were trained with QuickGELU")
    add("--overwrite", action="store_true", help="replace earlier exports in OUT")
    return parser


if __name__ == "__main__":
    sys.exit(main())
