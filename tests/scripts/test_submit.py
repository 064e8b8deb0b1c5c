"""`scripts.submit` with stand-ins for Slurm's commands: what is written, what reaches sbatch, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts import submit
from tests.helpers.process import ROOT, environment

SBATCH = """#!/usr/bin/env python3
import json, os, sys
said = os.environ["SAID"]
number = sum(1 for _ in open(said)) + 1 if os.path.exists(said) else 1
with open(said, "a") as file:
    print(json.dumps({"args": sys.argv[1:], "script": open(sys.argv[-1]).read(), "env": dict(os.environ)}), file=file)
if number > int(os.environ.get("ACCEPTED", "99")):
    sys.exit("sbatch: error: Batch job submission failed: Invalid account\\n  or partition")
print(f"{76 + number};cluster")
"""
DATA = ("--train-data", "s3://bucket/{00..99}.tar", "--train-num-samples", "1000")


class Desk:
    """A login node: a working directory, folders of runs, stand-ins that note what they are told."""

    def __init__(self, folder: Path):
        self.folder, self.logs, self.run = folder, folder / "logs", folder / "logs" / "b32"
        self.said, self.squeue = folder / "said", folder / "queue"
        commands = folder / "bin"
        commands.mkdir()
        (commands / "sbatch").write_text(SBATCH)
        (commands / "squeue").write_text(f'#!/bin/sh\ncat "{self.squeue}" 2>/dev/null\n')
        (commands / "scancel").write_text(f'#!/bin/sh\necho "$@" >>"{folder}/cancelled"\n')
        for command in commands.iterdir():
            command.chmod(0o755)

    @property
    def calls(self) -> list[dict]:
        """What sbatch was told, call by call."""
        return [json.loads(line) for line in self.said.read_text().splitlines()] if self.said.exists() else []

    def script(self) -> str:
        """The script of the only submission."""
        (path,) = self.run.glob("submissions/*/submit.sbatch")
        return path.read_text()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """The test stands in its working directory."""
    found = Desk(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(found.said))
    for name in ("TRAIN_DATA", "NAME", "LOGS", "CLIPYARD_VENV", "CONTAINER_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    return found


def _submit(*words: str) -> int:
    return submit.main(["8xh100", "--name", "b32", *words])


def test_a_run_is_submitted_from_a_copy_of_the_code(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--nodes", "4", "--time", "1:00:00", "--partition", "gpu", "--account", "lab", "--qos", "high")
    assert _submit(*options, "--sbatch-arg=--gres=none", "--", *DATA, "--lr", "3e-4") == 0
    (call,) = desk.calls
    (code,) = (desk.run / "code").iterdir()
    lines = call["script"].splitlines()
    wanted = {"--nodes=4", "--time=1:00:00", "--partition=gpu", "--account=lab", "--qos=high", "--gres=none"}
    wanted |= {"--job-name=b32", f"--chdir={code}", f"--output={desk.run}/slurm-%j.out", "--open-mode=append"}
    assert {f"#SBATCH {option}" for option in wanted} <= set(lines)
    assert {"    --lr 3e-4 \\", "    --resume latest \\", f"    --logs {desk.logs} \\"} <= set(lines)
    assert (code / "training/main.py").read_text() == (ROOT / "training/main.py").read_text()
    assert (code / "slurm/env.sh").exists()
    shown = capsys.readouterr().out
    assert "submitted: job 77\n" in shown and f"tail -F {desk.run}/slurm-77.out" in shown


def test_what_was_submitted_is_kept_beside_the_run(desk: Desk) -> None:
    assert _submit("--", *DATA) == 0
    (folder,) = (desk.run / "submissions").iterdir()
    assert {path.name for path in folder.iterdir()} - {"changes.diff"} == {"submit.sbatch", "config.yaml", "commit.txt"}
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert (settings["model"], settings["logs"], settings["name"]) == ("ViT-H-14", str(desk.logs), "b32")
    (code,) = (desk.run / "code").iterdir()
    assert f"code/{code.name}" in (folder / "commit.txt").read_text()
    assert desk.calls[0]["args"] == ["--parsable", str(folder / "submit.sbatch")]
    assert not (desk.run / "config.yaml").exists()


def test_equal_code_is_copied_once(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert _submit("--", *DATA) == 0
    assert _submit("--", *DATA) == 0
    assert "there already" in capsys.readouterr().out
    assert len(list((desk.run / "code").iterdir())) == 1
    assert len(list((desk.run / "submissions").iterdir())) == 2


def test_print_shows_the_script_writes_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    words = ["8xa100_40gb", "--name", "b32", "--logs", "runs", "--print", "--", *DATA]
    program = f"import sys, scripts.submit as s; sys.exit(s.main({words!r}) or 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n# train_8xa100_40gb.sbatch, as submitted by: python -m scripts.submit")
    assert f"\nLOGS={tmp_path}/runs\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_credentials_reach_the_job_and_no_file(desk: Desk) -> None:
    url = "https://me:geheim@host/{00..99}.tar"
    assert _submit("--", "--train-data", url, "--train-num-samples", "10") == 0
    assert desk.calls[0]["env"]["TRAIN_DATA"] == url
    assert '--train-data "${TRAIN_DATA:?' in desk.script()
    holding = [
        path for path in desk.run.rglob("*") if path.is_file() and "me:geheim" in path.read_text(errors="replace")
    ]
    assert not [path for path in holding if "code" not in path.relative_to(desk.run).parts]


def test_a_file_of_settings_wins_over_the_template_and_is_kept(desk: Desk) -> None:
    (desk.folder / "mine.yaml").write_text("batch_size: 7\ntrain_data: shards/{0..9}.tar\ntrain_num_samples: 70\n")
    assert _submit("--", "--config", "mine.yaml") == 0
    script = desk.script()
    assert "--batch-size" not in script
    assert f"    --train-data '{desk.folder}/shards/{{0..9}}.tar' \\" in script
    (copy,) = desk.run.glob("submissions/files/*/mine.yaml")
    assert f"    --config {copy} \\" in script
    (settings,) = map(yaml.safe_load, (path.read_text() for path in desk.run.glob("submissions/*/config.yaml")))
    assert (settings["batch_size"], settings["train_num_samples"]) == (7, 70)


def test_a_file_of_the_checkout_is_read_from_the_copy(desk: Desk) -> None:
    model = ROOT / "configs/models/ViT-B-32.yaml"
    assert _submit("--", *DATA, "--model", str(model)) == 0
    assert "    --model configs/models/ViT-B-32.yaml \\" in desk.script()


def test_a_model_file_is_the_same_setting_until_its_content_changes(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    model = desk.folder / "mine.yaml"
    model.write_text("# with the tokenizer of old\n" + (ROOT / "configs/models/ViT-B-32.yaml").read_text())
    assert _submit("--", *DATA, "--model", "mine.yaml") == 0
    (settings,) = desk.run.glob("submissions/*/config.yaml")
    (desk.run / "config.yaml").write_text(settings.read_text())
    assert _submit("--", *DATA, "--model", "mine.yaml") == 0
    model.write_text(model.read_text() + "# another\n")
    assert _submit("--", *DATA, "--model", "mine.yaml") == 2
    assert "the run exists with other settings (model '" in capsys.readouterr().err


def test_a_file_with_a_credential_stays_where_it_is(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    (desk.folder / "mine.yaml").write_text("train_data: https://me:geheim@host/0.tar\ntrain_num_samples: 8\n")
    assert _submit("--", "--config", "mine.yaml") == 0
    assert f"note: {desk.folder}/mine.yaml holds a credential: not copied" in capsys.readouterr().out
    assert f"    --config {desk.folder}/mine.yaml \\" in desk.script()
    assert not list(desk.run.glob("submissions/files/*"))


def test_the_environment_of_python_is_found_from_anywhere(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPYARD_VENV", "venvs/mine")
    assert _submit("--", *DATA) == 0
    assert f"\nCLIPYARD_VENV={desk.folder}/venvs/mine\n" in desk.script()


def test_a_container_gets_its_image_and_what_the_settings_name(desk: Desk) -> None:
    (desk.folder / "shards").mkdir()
    (desk.folder / "clipyard.sqsh").touch()
    container = ("--container-image", "clipyard.sqsh", "--container-mounts", "/scratch:/scratch")
    assert _submit(*container, "--", "--train-data", "shards/{0..9}.tar", "--train-num-samples", "10") == 0
    shards = desk.folder / "shards"
    assert f"\nCONTAINER_IMAGE={desk.folder}/clipyard.sqsh\n" in desk.script()
    assert f"\nCONTAINER_MOUNTS=/scratch:/scratch,{shards}:{shards}\n" in desk.script()
    assert "CLIPYARD_VENV" not in desk.script()


def test_a_chain_is_so_many_jobs_that_wait_for_each_other(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert _submit("--chain", "3", "--", *DATA) == 0
    assert len(desk.calls) == 3
    assert {"#SBATCH --dependency=singleton", "#SBATCH --no-requeue", "finish_link $?"} <= set(
        desk.script().splitlines()
    )
    assert "submitted: job 77 78 79\n" in capsys.readouterr().out


def test_half_a_chain_is_taken_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCEPTED", "2")
    assert _submit("--chain", "3", "--", *DATA) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: sbatch: error: Batch job submission failed: Invalid account or partition (the script is"
    )
    assert said.count("\n") == 1
    assert (desk.folder / "cancelled").read_text() == "77\n78\n"


def test_a_second_job_of_a_run_has_to_wait(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.squeue.write_text(f"41 /elsewhere\n42 {desk.run}/code/abc\n")
    assert _submit("--", *DATA) == 2
    assert "error: job 42 of this run is still queued or running" in capsys.readouterr().err
    assert not desk.calls
    assert _submit("--dependency", "afterok:40", "--", *DATA) == 2
    assert _submit("--dependency", "afterany:42", "--", *DATA) == 0
    assert _submit("--chain", "2", "--", *DATA) == 0


def test_a_run_with_other_settings_is_not_gone_on_with_unasked(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert _submit("--", *DATA) == 0
    (settings,) = desk.run.glob("submissions/*/config.yaml")
    (desk.run / "config.yaml").write_text(settings.read_text())
    assert _submit("--", *DATA, "--resume", "latest") == 0
    assert _submit("--", *DATA, "--lr", "7e-4") == 2
    assert "the run exists with other settings (lr 0.001, now 0.0007); --allow-changes" in capsys.readouterr().err
    assert _submit("--allow-changes", "--", *DATA, "--lr", "7e-4") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("8xv100", "--name", "b32"), "no template '8xv100': take one of chained,"),
        (("8xh100", "--", *DATA), "--name is missing: it names the folder"),
        (
            ("8xh100", "--name", "b32", "--lr", "1"),
            "unrecognized arguments: --lr 1; flags of training.main stand behind",
        ),
        (("8xh100", "--name", "b32", "--chain", "0", "--", *DATA), "--chain: must be at least 1"),
        (
            ("8xh100", "--name", "b32", "--sbatch-arg=--export=ALL,HF_TOKEN=geheim", "--", *DATA),
            "a credential would be written into the script (#SBATCH --export=ALL,HF_TOKEN=***); export it instead",
        ),
        (("8xh100", "--name", "a/b", "--", *DATA), "--name 'a/b' is not a plain folder name"),
        (("8xh100", "--name", "b32"), "TRAIN_DATA: must name the shards (export it"),
        (("8xh100", "--name", "b32", "--", *DATA, "--lerning-rate", "1"), "unknown flag --lerning-rate"),
        (("8xh100", "--name", "b32", "--", *DATA, "--lr", "fast"), "expected a number, got 'fast'"),
        (
            ("8xh100", "--name", "b32", "--", *DATA, "--model", "ViT-H14"),
            "unknown model 'ViT-H14'; did you mean ViT-H-14",
        ),
        (
            ("8xh100", "--name", "b32", "--", *DATA, "--resume", "epoch_1"),
            "--resume epoch_1: a requeued job would begin",
        ),
        (("8xh100", "--name", "b32", "--", *DATA, "--dry-run"), "--dry-run needs no job"),
        (("8xh100", "--name", "b32", "--", *DATA, "--config", "no.yaml"), "--config no.yaml"),
        (("8xa100_40gb", "--name", "b32", "--", *DATA, "--accum-freq", "2"), "--ddp-static-graph"),
    ],
)
def test_a_mistake_costs_seconds_and_one_line(
    desk: Desk, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert submit.main(list(words)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1
    assert not desk.calls and not desk.logs.exists()


def test_a_machine_without_slurm_is_told_so(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bash", "git"):  # which are needed, too
        (desk.folder / "bin" / name).symlink_to(f"/usr/bin/{name}")
    (desk.folder / "bin" / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(desk.folder / "bin"))
    assert _submit("--", *DATA) == 2
    assert "error: no sbatch here: submit on a node with Slurm's commands" in capsys.readouterr().err
    assert not desk.logs.exists()
