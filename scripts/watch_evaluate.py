"""`python -m scripts.watch_evaluate RUN --zeroshot-data name=folder`: evaluates a run's checkpoints as they come.

For other machines than the trainer's; runs on several ranks under torchrun or Slurm. Ends with 0 when the run is
complete, and with 75 at a signal; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import EXIT_FAILED, PeerError, StoppedEarly, UserError, describe_os_error
from training.leave import leave
from training.preemption import Preemption, hold_signals

if TYPE_CHECKING:
    from training.evaluation.desk import WatchConfig

# A batch is all that is waited for at a stop.
_MARGIN_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates until the run is complete. Returns the exit code."""
    # A signal may come while torch is imported, too: the heavy imports are inside.
    with Preemption(margin_s=_MARGIN_S) as preemption:
        args = build_parser().parse_args(argv)
        try:
            return _watch(args, preemption)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except StoppedEarly as stop:
            why = preemption.requested() or "another rank was asked to"
            print(f"stopped ({why}): what was measured is kept, the same command goes on", file=sys.stderr)
            return stop.exit_code
        except PeerError as error:
            return error.exit_code  # the rank that met the error has said so itself
        except OSError as error:
            print(f"error: {describe_os_error(error)}", file=sys.stderr)
            return EXIT_FAILED


def _watch(args: argparse.Namespace, preemption: Preemption) -> int:
    from scripts.evaluate import exam_of
    from training.config import ClusterConfig
    from training.console import logging_to
    from training.distributed import session
    from training.evaluation.watch import watch

    config, exam = _watch_config(args), exam_of(args)
    with session(ClusterConfig(device=args.device)) as world, logging_to(None, world.rank):
        return watch(config, exam, world, lambda: preemption.requested() is not None)


def _watch_config(args: argparse.Namespace) -> WatchConfig:
    from training.evaluation.desk import WatchConfig
    from training.evaluation.lookout import Choice

    return WatchConfig(
        run=args.run,
        output=args.output,
        choice=Choice(args.epochs_only, args.every, args.once, args.idle_minutes),
        interval_s=args.interval_s,
        averaged=args.ema,
        tokenizer=args.tokenizer,
        scratch=args.scratch,
        report_to=args.report_to,
        wandb_project=args.wandb_project_name,
    )


def build_parser() -> argparse.ArgumentParser:
    """The flags, those of `scripts.evaluate` for sets among them."""
    from scripts.evaluate import add_set_flags

    parser = argparse.ArgumentParser(prog="python -m scripts.watch_evaluate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of the run, <logs>/<name>, or the URL of its copy, <--remote-sync>/<name>")
    add("--output", type=Path, help="folder for evaluations.jsonl, where RUN is a URL or cannot be written")
    add("--once", action="store_true", help="evaluate what is there, and end")
    add("--interval-s", type=float, default=60.0, help="seconds between two looks at the run")
    add("--idle-minutes", type=float, help="end when no new checkpoint has come for so long")
    add("--epochs-only", action="store_true", help="only checkpoints at the ends of epochs")
    add("--every", type=int, default=1, metavar="N", help="between epochs, only steps that are multiples of N")
    add("--ema", action="store_true", help="the moving average of the weights too, as val/ema/...")
    add("--tokenizer", help="folder of its Hugging Face tokenizer, if it is not where it was in training")
    add("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where a checkpoint of a URL lies meanwhile")
    add("--report-to", default="", help="any of wandb, tensorboard (comma-separated), or all; as in training")
    add("--wandb-project-name", default="clipyard", help="W&B project of the run")
    add_set_flags(parser)
    return parser


if __name__ == "__main__":
    hold_signals()
    leave(main())
