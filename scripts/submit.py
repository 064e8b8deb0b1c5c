"""`python -m scripts.submit TEMPLATE --name NAME -- FLAGS`: a run checked, its code kept, and queued in Slurm.

TEMPLATE is a file of slurm/ by its name, or the path of any sbatch file that ends its command with "$@". Behind --
stand the flags of training.main; they win over the template's. Mistakes in them are told before anything is queued.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from scripts.arguments import positive
from training.errors import ConfigError
from training.submission.queue import QueueError
from training.submission.submit import TEMPLATES, Request, Submission, Submitted, prepare, submit
from training.submission.template import template_names

_OPTIONS = ("nodes", "time", "partition", "account", "qos", "job-name", "dependency")


def main(argv: Sequence[str] | None = None) -> int:
    """Submits, or prints the script with --print. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    try:
        args = _parser().parse_args(words[:cut])
        submission = prepare(_request(args, words, words[cut + 1 :]), os.environ, Path.cwd())
        if args.print:
            print(submission.text, end="")
            return 0
        _report(submission, submit(submission, os.environ))
    except (ConfigError, QueueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "; flags of training.main stand behind --" if "unrecognized" in message else ""
        raise ConfigError(f"{message}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m scripts.submit",
        usage="%(prog)s TEMPLATE --name NAME [options] -- FLAGS OF training.main",
        description=__doc__.split("\n", 1)[1],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "template",
        metavar="TEMPLATE",
        help=f"{', '.join(template_names(TEMPLATES))} (train_ may be left out), or a path",
    )
    add("--name", help="name of the run, and of the job")
    add("--logs", help="where run folders are")
    for option in _OPTIONS:
        add(f"--{option}", help="as sbatch takes it, instead of the template's")
    add(
        "--sbatch-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="any other option of sbatch, e.g. --sbatch-arg=--gres=gpu:4",
    )
    add("--container-image", help="run the ranks in this image by pyxis; Python is the image's")
    add("--container-mounts", help="further SRC:DST,... beside the run's folder and the data's")
    add(
        "--chain",
        type=positive,
        default=0,
        metavar="K",
        help="K jobs, each waiting for the one before, for sites without requeue",
    )
    add("--allow-changes", action="store_true", help="go on with a run whose settings were others")
    add("--print", action="store_true", help="show the script, write and submit nothing")
    return parser


def _request(args: argparse.Namespace, command: Sequence[str], flags: Sequence[str]) -> Request:
    given = {option: getattr(args, option.replace("-", "_")) for option in _OPTIONS}
    own = [f"--{name}={value}" for name in ("name", "logs") if (value := getattr(args, name)) is not None]
    return Request(
        template=args.template,
        flags=(*own, *flags),
        options=tuple((option, value) for option, value in given.items() if value is not None),
        sbatch_args=tuple(args.sbatch_arg),
        container_image=args.container_image,
        container_mounts=args.container_mounts,
        chain=args.chain,
        allow_changes=args.allow_changes,
        command=tuple(command),
    )


def _report(submission: Submission, done: Submitted) -> None:
    for note in submission.notes:
        print(f"note: {note}")
    first, jobs = done.jobs[0], " ".join(done.jobs)
    follows = "go on in the next job" if submission.links > 1 else "requeue"
    print(f"code: {done.code} ({len(submission.code.files)} files{'' if done.copied else ', there already'})")
    print(f"script: {submission.script}")
    print(f"submitted: job {jobs}")
    print(f"watch: squeue -j {','.join(done.jobs)}; tail -F {submission.run / f'slurm-{first}.out'}")
    print(f"save and {follows}: scancel --signal=USR2 {first}; end: scancel {jobs}")


if __name__ == "__main__":
    sys.exit(main())
