"""`python -m scripts.evaluate --checkpoint FOLDER --zeroshot-data name=folder`: what a model scores.

Runs on several ranks under torchrun or Slurm; the figures are the same for any number of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training.config import ClusterConfig, DataConfig, EvalConfig
from training.distributed import World, session
from training.errors import PeerError, UserError
from training.evaluation.standalone import evaluate_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates and prints a table. Returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        with session(ClusterConfig(device=args.device)) as world:
            figures = evaluate_checkpoint(
                args.checkpoint,
                args.model,
                eval_config(args),
                data_config(args),
                world,
                args.batch_size,
                args.precision,
                args.ema,
                args.tokenizer,
            )
            _report(figures, args.json, world)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except PeerError as error:
        return error.exit_code  # the rank that met the error has said so itself
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint folder, run folder (its newest), .safetensors, or OpenCLIP .pt")
    add("--model", help="name or configuration file; a checkpoint folder knows its own")
    add("--ema", action="store_true", help="the moving average of the weights that the checkpoint holds")
    add("--tokenizer", help="folder of its Hugging Face tokenizer, if it is not where it was in training")
    add_set_flags(parser)
    add("--json", type=Path, help="also write the figures to this file")
    return parser


def add_set_flags(parser: argparse.ArgumentParser) -> None:
    """What is scored on, and how; for other scripts that score too."""
    add = parser.add_argument
    add("--zeroshot-data", nargs="+", default=[], metavar="NAME=FOLDER", help="sets in CLIP_benchmark's layout")
    add("--imagenet-val", help="ImageNet's validation set: one folder per WordNet id")
    add("--imagenet-v2", help="ImageNet-V2: one folder per number of a class")
    add("--retrieval-data", nargs="+", default=[], metavar="NAME=FOLDER", help="images with captions")
    add("--linear-probe-data", nargs="+", default=[], metavar="NAME=FOLDER", help="sets with train/ and test/ splits")
    add("--eval-suite", nargs="+", default=[], metavar="SUITE", help="names in configs/eval, or YAML files")
    add("--eval-root", help="where a suite's sets are, with {name} for a set's name")
    add("--val-data", help="image-text pairs for retrieval: shards, a list or a folder")
    add("--val-num-samples", type=int, help="number of pairs in --val-data; another count found is an error")
    add("--caption-key", default="txt", help="txt, or json:FIELD")
    add("--csv-separator", default="\t")
    add("--csv-img-key", default="filepath")
    add("--csv-caption-key", default="title")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=4, help="decoding threads per rank")
    add("--precision", default="fp32", choices=("fp32", "amp_bfloat16", "amp_bf16"))
    add("--device", default="auto", choices=("auto", "cuda", "cpu"))


def eval_config(args: argparse.Namespace) -> EvalConfig:
    """The sets of `add_set_flags` but `--val-data`."""
    return EvalConfig(
        imagenet_val=args.imagenet_val,
        imagenet_v2=args.imagenet_v2,
        zeroshot_data=tuple(args.zeroshot_data),
        retrieval_data=tuple(args.retrieval_data),
        linear_probe_data=tuple(args.linear_probe_data),
        eval_suite=tuple(args.eval_suite),
        eval_root=args.eval_root,
    )


def data_config(args: argparse.Namespace) -> DataConfig:
    """The pairs of `add_set_flags`."""
    return DataConfig(
        val_data=args.val_data,
        val_num_samples=args.val_num_samples,
        caption_key=(args.caption_key,),
        csv_separator=args.csv_separator,
        csv_img_key=args.csv_img_key,
        csv_caption_key=args.csv_caption_key,
        workers=args.workers,
    )


def _report(figures: dict[str, float], path: Path | None, world: World) -> None:
    if not world.is_main:
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4f}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
