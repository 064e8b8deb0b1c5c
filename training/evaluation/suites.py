"""Suites: YAML lists of sets with their sizes, in `configs/eval` or a file of one's own. Opens no set.

about: one line
root: https://huggingface.co/datasets/clip-benchmark/wds_{name}/resolve/main
sets:
  - {name: imagenet1k, task: zeroshot, num_samples: 50000, num_classes: 1000, main: top1}
  - {name: coco, url: /data/coco, task: retrieval, num_samples: 5000, num_captions: 25010}
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data import is_local, local_path, mask_url
from training.errors import ConfigError
from training.evaluation.specs import FIGURES, KINDS, PAIRS, ZEROSHOT, Manifest, SetSpec, is_metric_name, stem_of

# Beside the package in a checkout, as the models' configurations are.
SUITES_DIR = Path(__file__).resolve().parents[2] / "configs" / "eval"
_PLACE = "{name}"
_SUITE_KEYS = ("about", "root", "sets")
_NUMBERS = ("num_samples", "num_classes", "num_captions")
_SET_KEYS = ("name", "task", "url", "main", *_NUMBERS, "classnames", "templates")


@dataclass(frozen=True)
class Suite:
    """A named list of sets."""

    name: str
    about: str
    specs: tuple[SetSpec, ...]


def list_suites() -> list[str]:
    """The names that `load_suite` knows."""
    return sorted(path.stem for path in SUITES_DIR.glob("*.yaml"))


def load_suite(name_or_path: str, root: str | None = None) -> Suite:
    """A suite by name, or from a file; `root` is used instead of its own (`--eval-root`).

    A root without `{name}` is a folder of folders. Raises ConfigError naming the file and the key.
    """
    path = _find(name_or_path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--eval-suite {path}: {' '.join(str(error).split())}") from None
    try:
        return _suite(path, raw, root)
    except ConfigError as error:
        raise ConfigError(f"--eval-suite {path}: {error}") from None


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        return Path(name_or_path)
    if name_or_path not in list_suites():
        near = difflib.get_close_matches(name_or_path, list_suites(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--eval-suite: unknown suite {name_or_path!r}{hint} (known: {', '.join(list_suites())}, or a YAML file)"
        )
    return SUITES_DIR / f"{name_or_path}.yaml"


def _suite(path: Path, raw: Any, root: str | None) -> Suite:
    if not isinstance(raw, dict) or not isinstance(raw.get("sets"), list) or not raw["sets"]:
        raise ConfigError("expected a mapping with a list `sets`")
    _refuse_unknown(raw, _SUITE_KEYS, "")
    root = root or (_beside(path, raw["root"]) if "root" in raw else None)
    specs = [_spec(path, number, entry, root) for number, entry in enumerate(raw["sets"], 1)]
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label!r} stands there twice")
    return Suite(path.stem, str(raw.get("about", "")), tuple(specs))


def _spec(path: Path, number: int, entry: Any, root: str | None) -> SetSpec:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"set {number}: expected a mapping with a name")
    name = entry["name"]
    _refuse_unknown(entry, _SET_KEYS, f"{name}: ")
    kind = entry.get("task", ZEROSHOT)
    if kind not in KINDS:
        raise ConfigError(f"{name}: task {kind!r} is none of {', '.join(KINDS)}")
    if not is_metric_name(name) or name == PAIRS:
        raise ConfigError(f"name {name!r}: letters, digits, '_', '-' and '.' make a name; {PAIRS!r} is --val-data's")
    return SetSpec(
        name,
        kind,
        _url(path, entry, root),
        f"{path.name}: {name}",
        stem_of(name, kind),
        Manifest(
            num_samples=_number(name, entry, "num_samples"),
            num_classes=_number(name, entry, "num_classes"),
            num_captions=_number(name, entry, "num_captions"),
        ),
        _main(name, kind, entry.get("main")),
        classnames=_beside(path, entry["classnames"]) if "classnames" in entry else None,
        templates=_beside(path, entry["templates"]) if "templates" in entry else None,
        suite=path.stem,
    )


def _url(path: Path, entry: dict[str, Any], root: str | None) -> str:
    if "url" in entry:
        return _beside(path, entry["url"])
    if not root:
        raise ConfigError(f"{entry['name']}: no url, and the suite has no root: give --eval-root")
    if _PLACE not in root:
        root = f"{root.rstrip('/')}/{_PLACE}"
    return root.replace(_PLACE, entry["name"])


def _beside(path: Path, url: Any) -> str:
    """A relative path counts from the suite's folder."""
    if not isinstance(url, str) or not url:
        raise ConfigError(f"expected a path or URL, got {url!r}")
    return str(path.parent / local_path(url)) if is_local(url) and not os.path.isabs(local_path(url)) else url


def _number(name: str, entry: dict[str, Any], key: str) -> int | None:
    value = entry.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name}: {key} is a whole number above 0, got {value!r}")
    return value


def _main(name: str, kind: str, main: Any) -> tuple[str, ...]:
    figures = main if isinstance(main, list) else [] if main is None else [main]
    for figure in figures:
        if figure not in FIGURES[kind]:
            raise ConfigError(f"{name}: main {figure!r} is none of {', '.join(FIGURES[kind])}")
    return tuple(figures)


def _refuse_unknown(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}unknown key {mask_url(str(key))!r} (known: {', '.join(known)})")
