"""Sbatch files taken apart and put together."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.helpers.process import ROOT
from training.errors import ConfigError
from training.submission.template import (
    as_link,
    parse_template,
    read_template,
    script,
    template_names,
    with_options,
)

SMALL = """#!/bin/bash
# What it is.
#SBATCH --nodes=2
#SBATCH -p old
#SBATCH --requeue

NAME="${NAME:-x}" LOGS="${LOGS:-./logs}"
ROOM=/data
source slurm/env.sh || exit 2

srun \\
    --mpi=none python -m training.main --lr 1 \\
    --train-data "$ROOM/{0..9}.tar" \\
    "$@"
finish $?
"""


def test_a_template_is_taken_apart() -> None:
    template = parse_template("small", SMALL)
    assert template.directives == ("--nodes=2", "-p old", "--requeue")
    assert template.assignments == ('NAME="${NAME:-x}" LOGS="${LOGS:-./logs}"', "ROOM=/data")
    assert template.launch == ("srun \\", "    --mpi=none python -m training.main")
    assert template.flags == ("--lr 1", '--train-data "$ROOM/{0..9}.tar"')
    assert template.ending == ("finish $?",)
    assert (template.option("nodes"), template.option("partition"), template.option("time")) == ("2", "old", None)


def test_a_script_reads_like_its_template_with_this_run_in_it() -> None:
    template = with_options(
        parse_template("small", SMALL), {"nodes": "8", "partition": "gpu", "output": "/a b/%j.out"}, ("--gres=none",)
    )
    assert script(template, ["Made for a test."], {"NAME": "run", "LOGS": "/logs"}, ["--lr 1", "--seed 3"]) == (
        """#!/bin/bash
# Made for a test.
#SBATCH --nodes=8
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --output='/a b/%j.out'
#SBATCH --gres=none

NAME=run
LOGS=/logs
ROOM=/data
source slurm/env.sh || exit 2

srun \\
    --mpi=none python -m training.main \\
    --lr 1 \\
    --seed 3 \\
    "$@"
finish $?
"""
    )


def test_files_that_start_another_program_are_no_templates() -> None:
    assert "chained" in template_names(ROOT / "slurm") and "watch_evaluate" not in template_names(ROOT / "slurm")


@pytest.mark.parametrize("name", template_names(ROOT / "slurm"))
def test_each_template_of_ours_becomes_a_script_that_bash_reads(name: str, tmp_path: Path) -> None:
    template = read_template(name, ROOT / "slurm")
    path = tmp_path / "submit.sbatch"
    path.write_text(script(template, [], {"NAME": "run"}, template.flags))
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert template.flags == parse_template(name, path.read_text()).flags


def test_a_link_of_a_chain_waits_and_is_never_requeued() -> None:
    link = as_link(parse_template("small", SMALL))
    assert "--requeue" not in link.directives
    assert {"--no-requeue", "--dependency=singleton"} <= set(link.directives)
    assert link.ending == ("finish_link $?",)
    late = as_link(with_options(parse_template("small", SMALL), {"dependency": "afterany:5"}))
    assert late.option("dependency") == "singleton,afterany:5"
    chained = read_template("chained", ROOT / "slurm")
    assert as_link(chained).ending == chained.ending


def test_a_template_is_found_by_name_short_name_or_path(tmp_path: Path) -> None:
    mine = tmp_path / "mine.sbatch"
    mine.write_text(SMALL)
    names = [read_template(name, ROOT / "slurm").name for name in ("8xh100", "train_8xh100", str(mine))]
    assert names == ["train_8xh100.sbatch", "train_8xh100.sbatch", "mine.sbatch"]
    with pytest.raises(ConfigError, match=r"no template '8xv100': take one of chained, .*train_8xh100"):
        read_template("8xv100", ROOT / "slurm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/bash\nsrun python other.py\n", "does not start|not an sbatch file"),
        ("#!/bin/bash\nsrun python -m training.main --lr 1\n", r'must end with "\$@"'),
    ],
)
def test_a_file_without_room_for_flags_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_template("odd", text)


def test_a_chain_needs_a_template_that_says_how_a_job_ends() -> None:
    with pytest.raises(ConfigError, match=r"--chain needs a template that ends with: finish"):
        as_link(parse_template("odd", SMALL.replace("finish $?", "exit $?")))
