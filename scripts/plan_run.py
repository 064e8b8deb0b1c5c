"""`python -m scripts.plan_run --gpu a100-80 --gpus 512 -- FLAGS`: what a run will take, before it is started.

Behind -- stand the flags of training.main; --train-data is not needed, --train-num-samples is. Nothing is allocated:
a model of any size is planned on a laptop. Memory is counted, speed follows from --mfu, which you state. With
--run FOLDER the flags are the run's own, and its first steps are held against the forecast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from scripts.arguments import positive
from training.cli import given_settings
from training.config import from_flat
from training.errors import ConfigError
from training.forecast import GPUS, Assumptions, Cluster, measure_costs, predict
from training.forecast.pace import Pace, pace_of, settings_of
from training.forecast.report import compare, describe
from training.plan import make_plan
from training.setup import resolve_model


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the forecast, and how a run compares. Returns the exit code: 2 when the run does not fit the GPU."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    try:
        args = _parser().parse_args(words[:cut])
        return _plan(args, words[cut + 1 :])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "; flags of training.main stand behind --" if "unrecognized" in message else ""
        raise ConfigError(f"{message}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m scripts.plan_run",
        usage="%(prog)s --gpu KIND --gpus N [options] -- FLAGS OF training.main",
        description=(__doc__ or "").split("\n", 1)[1],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpu", choices=sorted(GPUS), default="a100-80", help="kind of GPU (default: a100-80)")
    add("--gpus", type=positive, help="how many; those of the run with --run")
    add("--gpus-per-node", type=positive, default=8)
    add("--link-gbit", type=float, default=100.0, help="network between nodes for each GPU, in Gbit/s (default: 100)")
    add("--mfu", type=float, default=0.3, help="model FLOPs as a share of the GPU's bf16 peak (default: 0.3)")
    add("--sample-kib", type=float, default=30.0, help="a pair in its shard, in KiB (default: 30)")
    add("--caption-tokens", type=positive, help="computed of a text on average (default: the whole context)")
    add("--decodes-per-core", type=float, default=400.0, help="pictures a second that a core decodes (default: 400)")
    add("--run", type=Path, metavar="FOLDER", help="a run to plan again, and to compare with")
    return parser


def _plan(args: argparse.Namespace, flags: Sequence[str]) -> int:
    if args.run is not None and flags:
        raise ConfigError("--run takes the run's own flags: leave out those behind --")
    pace = None if args.run is None else pace_of(args.run)
    config = from_flat(given_settings(flags) if args.run is None else settings_of(args.run))
    cluster = _cluster(args, pace)
    given = Assumptions(args.mfu, round(args.sample_kib * 1024), args.decodes_per_core)
    if config.data.train_num_samples is None:
        raise ConfigError("--train-num-samples is needed behind --: the length of an epoch")
    model = resolve_model(config)
    plan = make_plan(config.optim, config.data.train_num_samples, cluster.num_gpus)
    costs = measure_costs(
        model,
        plan.micro_batch,
        config.model.precision,
        config.model.grad_checkpointing,
        args.caption_tokens or model.text_cfg.context_length,
    )
    forecast = predict(config, plan, costs, model.embed_dim, cluster, given)
    for line in describe(config.model.model, plan, costs, cluster, given, forecast):
        print(line)
    if pace is not None:
        for line in compare(pace, plan, given, forecast):
            print(line)
    return 0 if forecast.fits else ConfigError.exit_code


def _cluster(args: argparse.Namespace, pace: Pace | None) -> Cluster:
    num_gpus = args.gpus or (pace.num_gpus if pace else None)
    if num_gpus is None:
        raise ConfigError("--gpus is needed: how many")
    return Cluster(GPUS[args.gpu], num_gpus, args.gpus_per_node, args.link_gbit)


if __name__ == "__main__":
    sys.exit(main())
