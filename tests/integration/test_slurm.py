"""The templates of slurm/ with stand-ins for Slurm's commands; runs of them are in test_slurm_runs.py."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from scripts import watch_evaluate
from tests.helpers.process import ROOT
from training.cli import parse_args

WATCH = ROOT / "slurm/watch_evaluate.sbatch"
TEMPLATES = sorted(path for path in (ROOT / "slurm").glob("*.sbatch") if path != WATCH)
TEMPLATE, CHAINED = ROOT / "slurm/train_8xh100.sbatch", ROOT / "slurm/chained.sbatch"

FAKE_SRUN = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["SEEN"], "w") as file:
    json.dump({"args": sys.argv[1:], "env": dict(os.environ)}, file)
if saved := os.environ.get("SAVES"):
    os.makedirs(saved)
    open(saved + "/manifest.json", "w").close()
sys.exit(int(os.environ.get("SRUN_EXIT", "0")))
"""


def _run_script(template: Path, folder: Path, *flags: str, **env: str) -> tuple[int, str, dict]:
    """Runs a template as plain bash with stand-ins for Slurm's commands: exit code, output, what srun saw."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "srun").write_text(FAKE_SRUN)
    for name in ("scontrol", "scancel"):
        (commands / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
    (commands / "squeue").write_text("#!/bin/sh\necho 2030-01-02T03:04:05\n")
    for command in commands.iterdir():
        command.chmod(0o755)
    settings = {"PATH": f"{commands}:{os.environ['PATH']}", "SEEN": str(folder / "seen"), "TZ": "UTC"}
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "my_run", "SLURM_CPUS_PER_TASK": "12"}
    data = {"TRAIN_DATA": "s3://bucket/{00..99}.tar", "TRAIN_NUM_SAMPLES": "1000", "CLIPYARD_VENV": str(folder)}
    data |= {"NAME": "run", "LOGS": str(folder / "logs")}
    done = subprocess.run(
        ["bash", str(template), *flags],
        cwd=ROOT,
        env=os.environ | settings | job | data | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seen = folder / "seen"
    return done.returncode, done.stdout + done.stderr, json.loads(seen.read_text()) if seen.exists() else {}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_template_holds_flags_that_the_program_knows(template: Path, tmp_path: Path) -> None:
    code, output, seen = _run_script(template, tmp_path, "--lr", "3e-4", NAME="mine")
    assert code == 0, output
    launch, flags = seen["args"][:6], seen["args"][6:]
    assert launch == ["--cpu_bind=v", "--accel-bind=gn", "python", "-u", "-m", "training.main"]
    config = parse_args(flags)
    assert (config.run.name, config.run.resume, config.optim.lr) == ("mine", "latest", 3e-4)
    assert config.data.train_data == "s3://bucket/{00..99}.tar"


def test_the_evaluation_beside_a_run_is_started_with_flags_that_it_knows_and_requeued_as_the_run_is(
    tmp_path: Path,
) -> None:
    flags = ("--zeroshot-data", "imagenet=s3://bucket/imagenet", "--idle-minutes", "60")
    code, output, seen = _run_script(WATCH, tmp_path, *flags, SRUN_EXIT="75")
    assert code == 75 and "scontrol requeue 77" in output, output
    assert seen["args"][2:6] == ["python", "-u", "-m", "scripts.watch_evaluate"]
    args = watch_evaluate.build_parser().parse_args(seen["args"][6:])
    assert (args.run, args.idle_minutes, args.once) == (str(tmp_path / "logs" / "run"), 60, False)
    assert [path.name for path in (tmp_path / "logs" / "run").iterdir()] == ["slurm_evaluate.log"]
    _, _, seen = _run_script(WATCH, tmp_path, *flags, RUN="s3://bucket/runs/b32")
    assert seen["args"][6] == "s3://bucket/runs/b32"


@pytest.mark.parametrize("template", [*TEMPLATES, WATCH], ids=lambda path: path.name)
def test_a_template_asks_slurm_for_signal_log_and_whole_nodes(template: Path) -> None:
    directives = {
        line.removeprefix("#SBATCH ") for line in template.read_text().splitlines() if line.startswith("#SBATCH")
    }
    assert {"--signal=USR2@300", "--open-mode=append", "--ntasks-per-node=8", "--gres=gpu:8"} <= directives
    assert ("--requeue" in directives) != ("--no-requeue" in directives)


def test_a_job_tells_its_ranks_cores_and_end(tmp_path: Path) -> None:
    _, _, seen = _run_script(TEMPLATES[0], tmp_path)
    assert seen["env"]["SRUN_CPUS_PER_TASK"] == "12"
    assert seen["env"]["CLIPYARD_END_TIME"] == "1893553445"
    assert "MASTER_ADDR" not in seen["env"]


@pytest.mark.parametrize(("seconds", "minutes"), [(3600, "58"), (180, "1"), (100, None), (-90, None)])
def test_ranks_that_hang_are_ended_before_the_job_is(tmp_path: Path, seconds: int, minutes: str | None) -> None:
    end = str(int(time.time()) + seconds + 30)  # some of which may pass before the job looks
    _, _, seen = _run_script(TEMPLATE, tmp_path, CLIPYARD_END_TIME=end)
    assert seen["env"].get("SLURM_TIMELIMIT") == minutes


def test_what_the_user_exported_is_kept(tmp_path: Path) -> None:
    exported = {"CLIPYARD_END_TIME": "5", "SRUN_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "7"}
    exported |= {
        "SLURM_WAIT": "11",
        "SLURM_KILL_BAD_EXIT": "1",
        "MASTER_ADDR": "here",
        "MASTER_PORT": "13",
        "SLURM_TIMELIMIT": "9",
    }
    _, _, seen = _run_script(TEMPLATES[0], tmp_path, **exported)
    assert {name: seen["env"][name] for name in exported} == exported


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, True), (2, False), (75, True), (137, True)])
def test_what_another_start_may_mend_is_requeued(tmp_path: Path, code: int, requeued: bool) -> None:
    ended, output, _ = _run_script(TEMPLATE, tmp_path, SRUN_EXIT=str(code))
    assert (ended, "scontrol requeue 77" in output) == (code, requeued), output


@pytest.mark.parametrize(("code", "cancelled"), [(0, True), (1, False), (2, True), (75, False)])
def test_a_chain_ends_when_there_is_nothing_more_to_do(tmp_path: Path, code: int, cancelled: bool) -> None:
    ended, output, _ = _run_script(CHAINED, tmp_path, SRUN_EXIT=str(code))
    assert (ended, "scancel --state=PENDING --name=my_run" in output) == (code, cancelled)
    assert "scontrol" not in output


def _starts(template: Path, folder: Path, codes: str, *flags: str, **env: str) -> list[bool]:
    """Whether each start, which ends with a code of `codes`, lets another follow."""
    again = []
    for number, code in enumerate(codes.split()):
        job = {"SRUN_EXIT": code.rstrip("s"), "SLURM_RESTART_COUNT": str(number)}
        saves = {"SAVES": str(folder / f"logs/run/checkpoints/step_{number}")} if code.endswith("s") else {}
        _, output, _ = _run_script(template, folder, *flags, **job, **saves, **env)
        again.append("scontrol requeue" in output or "the next job of the chain" in output)
    return again


@pytest.mark.parametrize("template", ["train_8xh100", "chained"])
def test_a_crash_that_comes_back_at_once_is_tried_three_times_more(tmp_path: Path, template: str) -> None:
    path = ROOT / f"slurm/{template}.sbatch"
    assert _starts(path, tmp_path, "1 137 1 1") == [True, True, True, False]


def test_a_crash_after_new_checkpoints_is_tried_for_ever(tmp_path: Path) -> None:
    assert _starts(TEMPLATE, tmp_path, "1 1 1s 1 1 1 1") == [True, True, True, True, True, True, False]


def test_retries_may_be_switched_off(tmp_path: Path) -> None:
    assert _starts(TEMPLATE, tmp_path, "1", RETRIES="0") == [False]


def test_preemptions_without_a_new_checkpoint_do_not_go_round_for_ever(tmp_path: Path) -> None:
    assert _starts(TEMPLATE, tmp_path, "75 75 1 75s 75 75 75", MAX_RESTARTS="2") == [True] * 6 + [False]


def test_where_no_folder_can_be_written_every_start_counts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert _starts(TEMPLATE, tmp_path, "1 1 1 1", "--logs", str(tmp_path / "file")) == [True, True, True, False]


def test_the_end_of_each_start_is_noted_beside_the_run_that_the_flags_name(tmp_path: Path) -> None:
    _, output, _ = _run_script(TEMPLATE, tmp_path, "--name=other", SRUN_EXIT="1", SLURM_JOB_NODELIST="n[0-1]")
    noted = (tmp_path / "logs/other/slurm.log").read_text()
    assert "job=77 restart=0 nodes=n[0-1] failed exit=1 checkpoint=no" in noted
    assert "exit code 1, without a new checkpoint (1 of 3): requeue of job 77" in output


def test_a_run_that_gave_up_counts_anew(tmp_path: Path) -> None:
    assert _starts(CHAINED, tmp_path, "1 1 1", RETRIES="1") == [True, False, True]


def test_a_site_without_requeue_is_told_what_else_there_is(tmp_path: Path) -> None:
    commands = tmp_path / "refusing"
    commands.mkdir()
    (commands / "scontrol").write_text("#!/bin/sh\necho no >&2; exit 1\n")
    (commands / "scontrol").chmod(0o755)
    site = tmp_path / "site.sh"
    site.write_text(f'PATH="{commands}:$PATH"\n')
    code, output, _ = _run_script(TEMPLATE, tmp_path, SRUN_EXIT="75", CLIPYARD_SITE=str(site))
    assert code == 75
    assert "no requeue here: submit again, or as a chain" in output


def test_ranks_run_in_the_container_that_is_exported(tmp_path: Path) -> None:
    image = {"CONTAINER_IMAGE": "clipyard.sqsh", "CONTAINER_MOUNTS": "/data:/data:ro", "NCCL_DEBUG": "INFO"}
    _, output, seen = _run_script(TEMPLATE, tmp_path, **image)
    flags = dict(word.split("=", 1) for word in seen["args"][2 : seen["args"].index("python")])
    logs = tmp_path / "logs"
    assert flags["--container-image"] == "clipyard.sqsh", output
    assert flags["--container-mounts"] == f"{ROOT}:{ROOT},{logs}:{logs},/data:/data:ro"
    assert flags["--container-workdir"] == str(ROOT)
    assert {"NCCL_DEBUG", "OMP_NUM_THREADS", "PYTHONPATH"} <= set(flags["--container-env"].split(","))
    assert logs.is_dir()


def test_loader_workers_import_the_code_of_the_job(tmp_path: Path) -> None:
    _, _, seen = _run_script(TEMPLATE, tmp_path, PYTHONPATH="/elsewhere")
    assert seen["env"]["PYTHONPATH"] == f"{ROOT}:/elsewhere"


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    code, output, seen = _run_script(TEMPLATES[0], tmp_path, TRAIN_DATA="")
    assert code != 0
    assert "TRAIN_DATA" in output
    assert not seen
