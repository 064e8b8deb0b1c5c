"""The story of an export: refuse, write, let the library read, compare, and only then give the folder its name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from models.clip import CLIP
from models.config import ModelConfig
from models.errors import ConfigError, ExportError
from models.export.target import Target
from models.export.verify import Agreement, verify

# Each in a module of its own, imported when asked for: most need packages that training does not.
TARGETS = ("openclip", "transformers", "timm", "onnx")


def check_export(config: ModelConfig, names: Sequence[str], out: Path, overwrite: bool = False) -> None:
    """Raises ConfigError for a target that cannot hold the model, with those that can, and for an output that is in
    the way. Reads no weights."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; an export is a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"{out} is not empty; --overwrite replaces what this export writes there")
    reasons = {name: _target(name).refusal(config) for name in TARGETS}
    for name in names:
        if reasons[name] is not None:
            able = ", ".join(other for other, reason in reasons.items() if reason is None)
            raise ConfigError(f"--to {name}: {reasons[name]}; {config.name or 'this model'} can go to {able}")


def export_model(model: CLIP, names: Sequence[str], out: Path, overwrite: bool = False) -> dict[str, Agreement]:
    """Writes `out/<target>` for each target; returns how far the features that its library reads are from the model's.

    All are written and compared in a folder beside `out`, so that one that fails leaves `out` as it was. Raises
    ConfigError before any work, and ExportError where a library reads another model or a file cannot be written.
    """
    check_export(model.config, names, out, overwrite)
    model = model.eval().cpu().float()
    out.parent.mkdir(parents=True, exist_ok=True)
    agreements = {}
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            for name in names:
                agreements[name] = _write_and_verify(model, _target(name), Path(scratch) / name)
            out.mkdir(exist_ok=True)
            for name in names:
                shutil.rmtree(out / name, ignore_errors=True)
                (Path(scratch) / name).rename(out / name)
    except OSError as error:
        raise ExportError(f"{out}: {error.strerror or error}") from error
    return agreements


def _write_and_verify(model: CLIP, target: Target, folder: Path) -> Agreement:
    folder.mkdir()
    target.write(model, folder)
    try:
        encoders = target.read(folder, model)
    except (ConfigError, OSError):
        raise
    except Exception as error:  # of any library, which must not take files for read that it cannot read
        raise ExportError(
            f"--to {target.name}: it cannot read what was written for it: {_first_line(error)}"
        ) from error
    return verify(model, target, encoders)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _target(name: str) -> Target:
    return import_module(f"models.export.to_{name}").TARGET
