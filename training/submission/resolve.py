"""What a submitted run will be told: template, environment and the user's flags made one checked command line.

Knows nothing of Slurm. Reads files of settings and writes none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.urls import is_local
from models import load_model_config
from training.cli import given_settings, parse_args
from training.config import TrainConfig, from_flat, to_flat
from training.errors import ConfigError
from training.secrets import mask_secrets, mask_text
from training.submission.flags import CONFIG, Flag, expand, flag, group, merge, put, words_of
from training.submission.paths import FILES, absolute_settings
from training.submission.snapshot import Code
from training.submission.template import Template

_IN_FILES = {CONFIG, "model", "distill_model", "train_data", "val_data"}  # settings that may name a file of settings
_OF_EACH_START = {"name", "logs", "resume"}  # the same run under another path is no other run


def resolve_flags(
    words: Sequence[str], template: Template, env: Mapping[str, str], cwd: Path
) -> tuple[list[Flag], TrainConfig]:
    """The trainer's flags and their meaning, with every path from the root. Raises ConfigError.

    What the user's own --config says wins over the template, as the user's flags do.
    """
    given = given_settings(words)
    if "name" not in given and not env.get("NAME"):
        raise ConfigError("--name is missing: it names the folder of the run, and what a requeued job goes on with")
    user = group(words)
    own = {each.setting for each in user}
    expanded = expand(template.assignments, merge(template.flags, user, without=given), env)
    given_settings(expanded)  # the template's own flags, too, must be known before they are grouped
    flags = [each for each in group(expanded) if each.setting in own or each.setting not in given]
    path = next((each.values[0] for each in flags if each.setting == CONFIG), None)
    if path:
        flags = put(flags, CONFIG, str(cwd / path))
    for setting, values in absolute_settings(parse_args(words_of(flags)), cwd):
        flags = put(flags, setting, *values)
    config = parse_args(words_of(flags))
    check_meaning(config)
    return flags, config


def check_meaning(config: TrainConfig) -> None:
    """What only a job's own start would find out otherwise. Raises ConfigError."""
    name = str(config.run.name)
    if Path(name).name != name:
        raise ConfigError(f"--name {name!r} is not a plain folder name; --logs says where run folders are")
    if config.run.dry_run:
        raise ConfigError("--dry-run needs no job: python -m training.main --dry-run")
    if config.run.resume != "latest":
        found = f"--resume {config.run.resume}" if config.run.resume else "no --resume"
        raise ConfigError(f"{found}: a requeued job would begin there again and again; --resume latest is needed")
    load_model_config(config.model.model)
    if config.model.distill_model:
        load_model_config(config.model.distill_model)


def refuse_other_settings(run: Path, config: TrainConfig) -> None:
    """ConfigError when the run exists and was made with other settings, which are named."""
    try:
        before = yaml.safe_load((run / "config.yaml").read_text())
    except FileNotFoundError:
        return
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{run / 'config.yaml'}: cannot be read ({' '.join(str(error).split())})") from error
    now = plain_settings(config)
    changed = [
        f"{name} {before[name]!r}, now {now[name]!r}"
        for name in now
        if name in before and name not in _OF_EACH_START and before[name] != now[name]
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"--name {config.run.name}: the run exists with other settings ({'; '.join(changed[:3])}{more}); "
            "--allow-changes goes on with the new ones, another --name starts a new run"
        )


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting as YAML holds it, credentials masked."""
    masked = mask_secrets(to_flat(config))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in masked.items()}


@dataclass(frozen=True)
class Kept:
    """Flags that name files where nobody edits them; what is to be copied from where to where; remarks."""

    flags: list[Flag]
    copies: dict[Path, Path]
    notes: tuple[str, ...]

    def settings(self, config: TrainConfig) -> TrainConfig:
        """`config` with the files' new places, as the job will read it."""
        moved = {each.setting: each.values[0] for each in self.flags if _names_file(each)}
        return from_flat(to_flat(config) | {name: value for name, value in moved.items() if name != CONFIG})


def keep_files(flags: Sequence[Flag], code: Code, folder: Path) -> Kept:
    """Files of settings are read from the copy of the code, or copied into `folder` under their content's digest."""
    kept, copies, notes = list(flags), dict[Path, Path](), []
    for i, each in enumerate(flags):
        path = Path(each.values[0]) if _names_file(each) else Path()
        if not (path.is_absolute() and path.is_file()):
            continue
        if path.is_relative_to(code.root) and (inside := path.relative_to(code.root).as_posix()) in code.files:
            kept[i] = flag(each.setting, inside)
        elif (text := (content := path.read_bytes()).decode(errors="replace")) != mask_text(text):
            notes.append(f"{path} holds a credential: not copied, read where it is at every start")
        else:
            copies[path] = folder / hashlib.sha256(content).hexdigest()[:8] / path.name
            kept[i] = flag(each.setting, str(copies[path]))
    return Kept(kept, copies, tuple(notes))


def _names_file(each: Flag) -> bool:
    return each.setting in _IN_FILES and each.values[0].endswith(FILES) and is_local(each.values[0])
