"""Relative paths in settings made absolute: a job runs in the folder of its code, not where it was submitted."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data.mixture import is_mixture
from data.urls import is_local, is_pipe, local_path
from training.config import TrainConfig, to_flat
from training.errors import ConfigError

FILES = (".json", ".yaml", ".yml")  # of settings: small, and kept with the run
_NAMED_SETS = ("zeroshot_data", "retrieval_data", "linear_probe_data")  # name=folder


def absolute_settings(config: TrainConfig, cwd: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(setting, its values) for every setting that means another file elsewhere than in `cwd`.

    Raises ConfigError for a mixture that names shards by relative paths: the file is not ours to change.
    """
    model, data = config.model, config.data
    values: dict[str, Any] = {
        "logs": _path(config.run.logs, cwd),
        "pretrained": _path(model.pretrained, cwd),
        "distill_pretrained": _path(model.distill_pretrained, cwd),
        "imagenet_val": _path(config.eval.imagenet_val, cwd),
        "model": _model(model.model, cwd),
        "distill_model": _model(model.distill_model, cwd),
        "train_data": _data(data.train_data, cwd, "--train-data"),
        "val_data": _data(data.val_data, cwd, "--val-data"),
        "imagenet_v2": _path(config.eval.imagenet_v2, cwd),
        **{name: tuple(_named(entry, cwd) for entry in getattr(config.eval, name)) for name in _NAMED_SETS},
        "eval_suite": tuple(str(_model(suite, cwd)) for suite in config.eval.eval_suite),
        "eval_root": _path(config.eval.eval_root, cwd),
    }
    given = to_flat(config)
    for name, value in values.items():
        if value != given[name]:
            yield name, value if isinstance(value, tuple) else (value,)


def local_folders(config: TrainConfig) -> list[str]:
    """Absolute folders of this machine that the settings name and that exist: what a container must see, too."""
    model = config.model
    named = [model.pretrained, model.distill_pretrained, model.model, model.distill_model]
    named += [config.eval.imagenet_val, config.eval.imagenet_v2, config.eval.eval_root, *config.eval.eval_suite]
    named += [entry.partition("=")[2] for name in _NAMED_SETS for entry in getattr(config.eval, name)]
    for data in (config.data.train_data, config.data.val_data):
        named += [part.strip() for part in (data or "").split("::")]
    folders = []
    for path in filter(None, named):
        if is_local(path) and os.path.isabs(local_path(path)):
            # The folder before the first brace or star, or that of a file.
            fixed = re.split(r"[{*?\[]", local_path(path))[0]
            folder = fixed if os.path.isdir(fixed) else os.path.dirname(fixed)
            folders += [folder.rstrip("/")] if os.path.isdir(folder) and folder != "/" else []
    return list(dict.fromkeys(folders))


def _path(path: str | None, cwd: Path) -> str | None:
    if not path or not is_local(path) or os.path.isabs(path):
        return path
    return str(cwd / local_path(path))


def _model(name: str | None, cwd: Path) -> str | None:
    return _path(name, cwd) if name and name.endswith(FILES) else name


def _named(entry: str, cwd: Path) -> str:
    name, sign, folder = entry.partition("=")
    return f"{name}={_path(folder, cwd)}" if sign else entry


def _data(data: str | None, cwd: Path, flag: str) -> str | None:
    if not data:
        return data
    if data.strip().startswith("["):
        return _mixture(data, cwd, flag)
    if is_mixture(data) and is_local(data.strip()):
        path = str(_path(data.strip(), cwd))
        _refuse_relative(path, cwd, flag)
        return path
    return "::".join(_pattern(part, cwd) for part in data.split("::"))


def _pattern(pattern: str, cwd: Path) -> str:
    if not is_pipe(pattern.strip()):
        return str(_path(pattern.strip(), cwd)) if pattern.strip() else pattern
    if any(_is_relative(word, cwd) for word in re.split(r"[\s;|&<>()'\"]+", pattern.strip().removeprefix("pipe:"))):
        return f"pipe:cd {shlex.quote(str(cwd))} && {pattern.strip().removeprefix('pipe:')}"
    return pattern


def _is_relative(word: str, cwd: Path) -> bool:
    """Whether a word of a command is a path below `cwd`: written as one, or with its folder there."""
    folder = re.split(r"[{*]", word)[0].rpartition("/")[0]
    return word.startswith(("./", "../")) or (bool(folder) and not folder.startswith("/") and (cwd / folder).is_dir())


def _mixture(text: str, cwd: Path, flag: str) -> str:
    entries = _entries(text, flag)
    for entry in entries:
        shards = entry.get("shards")
        if isinstance(shards, str):
            entry["shards"] = _pattern(shards, cwd)
        elif isinstance(shards, list):
            entry["shards"] = [_pattern(str(part), cwd) for part in shards]
    changed = yaml.safe_dump(entries, default_flow_style=True, sort_keys=False, width=float("inf")).strip()
    return text if entries == _entries(text, flag) else changed


def _refuse_relative(path: str, cwd: Path, flag: str) -> None:
    try:
        text = Path(local_path(path)).read_text()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error
    for entry in _entries(text, f"{flag} {path}"):
        shards = entry.get("shards")
        for pattern in shards if isinstance(shards, list) else [shards]:
            if isinstance(pattern, str) and _pattern(pattern, cwd) != pattern:
                raise ConfigError(
                    f"{flag} {path}: {pattern!r} is a relative path, and the job runs in another folder; "
                    "write it from the root"
                )


def _entries(text: str, where: str) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: no YAML ({' '.join(str(error).split())})") from error
    entries = entries.get("sources") if isinstance(entries, dict) else entries
    return [entry for entry in entries or [] if isinstance(entry, dict)]
