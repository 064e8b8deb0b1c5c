"""The story of a submission: check the flags, write the script, keep the code, hand it to Slurm.

All that can be wrong is found before anything is written or queued. The folder of the run then holds
`code/<digest>/` (where the job runs), `submissions/<time>/` (script, settings, commit), and `slurm-<job>.out`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from training.config import TrainConfig
from training.errors import ConfigError
from training.secrets import mask_text
from training.submission.flags import is_secret, written
from training.submission.paths import local_folders
from training.submission.queue import cancel, jobs_in, sbatch
from training.submission.resolve import keep_files, plain_settings, refuse_other_settings, resolve_flags
from training.submission.snapshot import SITE, Code, snapshot, survey
from training.submission.template import as_link, read_template, script, with_options

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "slurm"


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    flags: the trainer's; options: sbatch's by name; sbatch_args: whole ones such as `--gres=none`; chain: so many
    jobs that wait for each other; command: the words that all this was read from, for the script's heading.
    """

    template: str
    flags: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    sbatch_args: tuple[str, ...] = ()
    container_image: str | None = None
    container_mounts: str | None = None
    chain: int = 0
    allow_changes: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submission:
    """A checked request: the script, and where everything will be.

    secrets: variables that go to the job by its environment; files: what is copied from where to where;
    dependency: what the jobs wait for, in sbatch's words.
    """

    run: Path
    folder: Path
    text: str
    config: TrainConfig
    code: Code
    secrets: Mapping[str, str]
    files: Mapping[Path, Path]
    notes: tuple[str, ...]
    links: int
    dependency: str

    @property
    def script(self) -> Path:
        """Where the script is written."""
        return self.folder / "submit.sbatch"


@dataclass(frozen=True)
class Submitted:
    """The ids of the jobs, and the copy of the code; `copied` is False where an equal one was there already."""

    jobs: tuple[str, ...]
    code: Path
    copied: bool


def prepare(request: Request, env: Mapping[str, str], cwd: Path, root: Path = ROOT) -> Submission:
    """Checks everything and writes nothing. Raises ConfigError."""
    template = read_template(request.template, root / "slurm")
    flags, config = resolve_flags(request.flags, template, env, cwd)
    run = Path(config.run.logs) / str(config.run.name)
    code = survey(root, without=Path(config.run.logs))
    kept = keep_files(flags, code, run / "submissions" / "files")
    config = kept.settings(config)
    if not request.allow_changes:
        refuse_other_settings(run, config)
    lines, secrets = zip(*map(written, kept.flags), strict=True)
    options = {"job-name": str(config.run.name), **dict(request.options)}
    options |= {"chdir": str(run / "code" / code.digest), "output": f"{run}/slurm-%j.out"}
    chosen = with_options(template, options, request.sbatch_args)
    chosen = as_link(chosen) if request.chain else chosen
    variables = job_variables(request, config, code, env, cwd)
    text = script(chosen, heading(request, template.name, code), variables, lines)
    refuse_secrets(text)
    return Submission(
        run=run,
        folder=_unused(run / "submissions" / datetime.now().strftime("%Y%m%d-%H%M%S")),
        text=text,
        config=config,
        code=code,
        secrets={name: value for each in secrets for name, value in each.items()},
        files=kept.copies,
        notes=kept.notes
        + tuple(f"{name} holds a credential: left out of the copy of the code" for name in code.left_out),
        links=max(1, request.chain),
        dependency=chosen.option("dependency") or "",
    )


def job_variables(
    request: Request, config: TrainConfig, code: Code, env: Mapping[str, str], cwd: Path
) -> dict[str, str]:
    """What slurm/env.sh is told: the run, the environment of Python or the container, the site's file."""
    variables = {"NAME": str(config.run.name), "LOGS": config.run.logs}
    image = request.container_image or env.get("CONTAINER_IMAGE")
    if image:
        mounts = [request.container_mounts or env.get("CONTAINER_MOUNTS", "")]
        mounts += [f"{folder}:{folder}" for folder in local_folders(config)]
        variables["CONTAINER_IMAGE"] = str(cwd / image) if (cwd / image).is_file() else image
        variables["CONTAINER_MOUNTS"] = ",".join(filter(None, mounts))
    else:
        variables["CLIPYARD_VENV"] = environment_of(code.root, env, cwd)
    if SITE in code.left_out:
        variables["CLIPYARD_SITE"] = str(code.root / SITE)
    return {name: value for name, value in variables.items() if value}


def environment_of(root: Path, env: Mapping[str, str], cwd: Path) -> str:
    """The Python environment of the job: the exported one, the checkout's, or the one that runs this; "" is PATH's."""
    if exported := env.get("CLIPYARD_VENV"):
        return str(cwd / exported)
    if (root / ".venv" / "bin" / "python").exists():
        return str(root / ".venv")
    return sys.prefix if sys.prefix != sys.base_prefix else ""


def heading(request: Request, template: str, code: Code) -> list[str]:
    """The script's first comment: what it is, and the command that made it."""
    command = shlex.join("***" if is_secret(word) else word for word in request.command)
    changed = ", with uncommitted changes" if code.changes else ""
    return [
        f"{template}, as submitted by: python -m scripts.submit {' '.join(command.split())}",
        f"Code: {code.commit}{changed}. To submit it again: sbatch this file.",
    ]


def refuse_secrets(text: str) -> None:
    """ConfigError when a credential stands in the script, from the template or an option: flags have none by now."""
    for line in text.splitlines():
        if (masked := mask_text(line)) != line:
            raise ConfigError(f"a credential would be written into the script ({masked.strip()}); export it instead")


def submit(submission: Submission, env: Mapping[str, str]) -> Submitted:
    """Writes code and script into the folder of the run, and queues the jobs. Raises ConfigError, QueueError."""
    if not shutil.which("sbatch", path=env.get("PATH")):
        raise ConfigError("no sbatch here: submit on a node with Slurm's commands; --print shows the script")
    refuse_two_at_once(submission, env)
    try:
        code, copied = snapshot(submission.code, submission.run / "code")
        write(submission)
    except OSError as error:
        raise ConfigError(f"the run folder {submission.run} cannot be written: {error.strerror}") from error
    jobs: list[str] = []
    try:
        for _ in range(submission.links):
            jobs.append(sbatch(submission.script, {**env, **submission.secrets}))
    except BaseException:
        for job in jobs:  # half a chain is not what was asked for
            cancel(job, env)
        raise
    return Submitted(tuple(jobs), code, copied)


def refuse_two_at_once(submission: Submission, env: Mapping[str, str]) -> None:
    """ConfigError when the run has a job that the new one would not wait for."""
    if "singleton" in submission.dependency:
        return
    awaited = re.findall(r"\d+", submission.dependency)
    if others := [job for job in jobs_in(submission.run, env) if job not in awaited]:
        raise ConfigError(
            f"job {', '.join(others)} of this run is still queued or running, and two would write into one folder: "
            f"scancel {' '.join(others)}, or let the new one wait with --dependency afterany:{':'.join(others)}"
        )


def write(submission: Submission) -> None:
    """The submission's own folder, and a line in the history that slurm/env.sh counts failures in."""
    folder, code = submission.folder, submission.code
    folder.mkdir(parents=True)
    for source, copy in submission.files.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain_settings(submission.config), sort_keys=False))
    (folder / "commit.txt").write_text(f"{code.commit}\ncode/{code.digest}, {len(code.files)} files\n")
    if code.changes:
        (folder / "changes.diff").write_text(code.changes, errors="surrogateescape")
    submission.script.write_text(submission.text)
    with open(submission.run / "slurm.log", "a") as history:
        history.write(f"{datetime.now().strftime('%FT%T')} submitted {submission.script}\n")


def _unused(folder: Path) -> Path:
    number, free = 1, folder
    while os.path.lexists(free):
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
