"""Which models have a name: one YAML file each in `configs/models`. Reads files, builds nothing.

A file states what differs from the schema's defaults, or, with `base: NAME`, from the model of that name: its
sections (vision_cfg, text_cfg, ...) are then laid over the base's, setting by setting.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from models.config import ModelConfig
from models.decode import did_you_mean
from models.errors import ConfigError

# Beside the package in a checkout, and so in an editable installation, which points at the checkout.
CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs" / "models"


def list_models() -> list[str]:
    """The names that `create_model` knows, in natural order."""
    return sorted((path.stem for path in CONFIG_DIR.glob("*.yaml")), key=_natural)


def load_model_config(name_or_path: str) -> ModelConfig:
    """A model's configuration by name, or from a JSON or YAML file in OpenCLIP's schema.

    Raises ConfigError for an unknown name (with the nearest ones), an unreadable file, or a wrong setting.
    """
    named = CONFIG_DIR / f"{name_or_path.replace('/', '-')}.yaml"
    is_path = Path(name_or_path).suffix in (".json", ".yaml", ".yml")
    if not is_path and not named.is_file():
        nearest = did_you_mean(name_or_path, list_models())
        raise ConfigError(f"unknown model {name_or_path!r}{nearest}. A path to a JSON or YAML file is taken too")
    path = Path(name_or_path) if is_path else named
    try:
        return ModelConfig.from_dict(_with_base(_parse(path), (path.stem,)), name=path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _with_base(raw: Any, trail: tuple[str, ...]) -> Any:
    """`raw` over its base, if it has one. `trail`: the names that led here."""
    if not isinstance(raw, dict) or "base" not in raw:
        return raw
    own = dict(raw)
    base = own.pop("base")
    path = CONFIG_DIR / f"{base}.yaml"
    if base in trail:
        raise ConfigError(f"base: {' -> '.join((*trail, base))} never ends")
    if not path.is_file():
        raise ConfigError(f"base: unknown model {base!r}{did_you_mean(str(base), list_models())}")
    return _laid_over(_with_base(_parse(path), (*trail, base)), own)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Settings of both, `above` first; sections one by one."""
    merged = dict(below)
    for key, value in above.items():
        both_sections = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = below[key] | value if both_sections else value
    return merged


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"model configuration {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"model configuration {path} is not valid: {' '.join(str(error).split())}") from None


def _natural(name: str) -> list[tuple[bool, int | str]]:
    parts = re.split(r"(\d+)", name.lower())
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in parts if part]
