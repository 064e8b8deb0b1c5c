"""`python -m scripts.evaluate --checkpoint FOLDER --zeroshot-data name=folder`: what one or several models score.

Runs on several ranks under torchrun or Slurm; the figures are the same for any number of them. With --results an
interrupted matrix of models and sets goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training.checkpoint_content import MODEL_FILE
from training.config import ClusterConfig, DataConfig, EvalConfig
from training.console import logging_to
from training.distributed import session
from training.errors import EXIT_DONE, EXIT_FAILED, ConfigError, FolderError, PeerError, UserError
from training.evaluation.exam import Exam
from training.evaluation.figures import values_of
from training.evaluation.matrix import Candidate, Cell, measure_matrix
from training.evaluation.specs import split_name
from training.evaluation.suites import load_suite
from training.evaluation.table import csv_text, markdown, plain, rows_of
from training.leave import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates and prints a table. Returns the exit code: 1 when a set could not be measured."""
    args = _parser().parse_args(argv)
    try:
        candidates, exam = _candidates(args), exam_of(args)
        with session(ClusterConfig(device=args.device)) as world, logging_to(None, world.rank):
            cells = measure_matrix(candidates, exam, world, args.results)
            world.on_main(lambda: _write(cells, exam, args), "writing the tables")
        if world.is_main:
            _tell_failed(cells)
        return EXIT_FAILED if any(cell.error for cell in cells) else EXIT_DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except PeerError as error:
        return error.exit_code  # the rank that met the error has said so itself


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="[NAME=]PATH",
        help="checkpoint folder, run folder (its newest), .safetensors, or OpenCLIP .pt; several make a table",
    )
    add("--model", nargs="+", help="name or configuration file, one or as many; a checkpoint folder knows its own")
    add("--ema", action="store_true", help="the moving average of the weights that the checkpoint holds")
    add("--tokenizer", help="folder of its Hugging Face tokenizer, if it is not where it was in training")
    add_set_flags(parser)
    add("--results", type=Path, help="JSONL file of what was measured: what it has is not measured again")
    add("--csv", type=Path, help="also write every figure with its interval to this file")
    add("--markdown", type=Path, help="also write the table to this file")
    add("--json", type=Path, help="also write the figures to this file, by model if there are several")
    return parser


def add_set_flags(parser: argparse.ArgumentParser) -> None:
    """What is scored on, and how; for other scripts that score too."""
    add = parser.add_argument
    add("--zeroshot-data", nargs="+", default=[], metavar="NAME=FOLDER", help="sets in CLIP_benchmark's layout")
    add("--imagenet-val", help="ImageNet's validation set: one folder per WordNet id")
    add("--imagenet-v2", help="ImageNet-V2: one folder per number of a class")
    add("--imagenet-prompts", default="own", choices=("own", "openclip"), help="openclip: those of published figures")
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


def exam_of(args: argparse.Namespace) -> Exam:
    """What `add_set_flags` asks for. Raises ConfigError."""
    if args.eval_root and not args.eval_suite:
        raise ConfigError("--eval-root says where the sets of --eval-suite are: there is none")
    return Exam(sets=eval_config(args), data=data_config(args), batch_size=args.batch_size, precision=args.precision)


def eval_config(args: argparse.Namespace) -> EvalConfig:
    """The sets of `add_set_flags` but `--val-data`."""
    return EvalConfig(
        imagenet_val=args.imagenet_val,
        imagenet_v2=args.imagenet_v2,
        imagenet_prompts=args.imagenet_prompts,
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


def _candidates(args: argparse.Namespace) -> list[Candidate]:
    models = args.model or [None]
    if len(models) == 1:
        models *= len(args.checkpoint)
    if len(models) != len(args.checkpoint):
        raise ConfigError(f"--model: {len(models)} for {len(args.checkpoint)} checkpoints; give one, or one for each")
    named = [_name_of(entry) for entry in args.checkpoint]
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--checkpoint: two are called {name!r}; write other-name=path")
    return [
        Candidate(name, path, model, args.ema, args.tokenizer)
        for (name, path), model in zip(named, models, strict=True)
    ]


def _name_of(entry: str) -> tuple[str, str]:
    """Name and path. Without a name: that of the run and of the checkpoint in it."""
    name = entry.partition("=")[0]
    if name != entry and "/" not in name and not Path(entry).exists():
        return split_name(entry, "--checkpoint")
    parts = [part for part in Path(entry).parts if part not in ("checkpoints", "/", ".", "..", MODEL_FILE)]
    is_in_run = "checkpoints" in Path(entry).parts
    return "/".join(parts[-2:] if is_in_run else parts[-1:]) or entry, entry


def _write(cells: list[Cell], exam: Exam, args: argparse.Namespace) -> None:
    """The table on the console, or one model's figures; and the files that were asked for."""
    suites = [load_suite(suite, args.eval_root) for suite in args.eval_suite]
    table = markdown(cells, rows_of(cells, exam.specs, suites))
    by_model: dict[str, dict[str, float]] = {}
    for cell in cells:
        by_model.setdefault(cell.candidate, {}).update(values_of(list(cell.figures)))
    is_single = len(by_model) == 1
    figures = next(iter(by_model.values())) if is_single else by_model
    print(plain(figure for cell in cells for figure in cell.figures) if is_single else table)
    texts = {args.csv: csv_text(cells), args.markdown: table, args.json: json.dumps(figures, indent=1) + "\n"}
    for path, text in texts.items():
        if path is not None:
            _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise FolderError(f"{path} cannot be written: {error.strerror or error}") from error


def _tell_failed(cells: list[Cell]) -> None:
    for cell in cells:
        if cell.error:
            print(f"error: {cell.candidate} on {cell.label}: {cell.error}", file=sys.stderr)


if __name__ == "__main__":
    leave(main())
