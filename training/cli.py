"""From command line and YAML to one `TrainConfig`. Flags are the fields of `training.config`; no torch here.

Precedence: field default, then `--config FILE`, then the command line. Values are decoded strictly by the
field's type: YAML reads 3e-4 as text and `no` as a boolean, and neither may slip through.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from models.errors import ConfigError
from training.config import TrainConfig, from_flat, sections
from training.rules import check_config


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the configuration as the command line sees it."""

    name: str
    kind: type
    is_tuple: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    section: str

    @property
    def flag(self) -> str:
        """The flag's name, e.g. --clip-grad-norm."""
        return "--" + self.name.replace("_", "-")


def settings() -> dict[str, Setting]:
    """Every setting by name, in the order of the sections."""
    found: dict[str, Setting] = {}
    for section, cls in sections().items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kind, is_tuple, optional = _unwrap(hints[field.name])
            meta = field.metadata
            found[field.name] = Setting(
                field.name,
                kind,
                is_tuple,
                optional,
                field.default,
                meta["help"],
                meta["choices"],
                meta["aliases"],
                section,
            )
    return found


def _unwrap(hint: Any) -> tuple[type, bool, bool]:
    """(element type, is a tuple, may be None) of a field's annotation."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, False
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None)), False, True
    return hint, False, False


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read the command line (and the file it names). Raises ConfigError; `--help` prints and exits with 0."""
    config = from_flat(given_settings(argv))
    check_config(config)
    return config


def given_settings(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What the command line and the file it names set, decoded, not yet held against each other. Raises ConfigError."""
    known = settings()
    namespace, unknown = _build_parser(known).parse_known_args(argv)
    if unknown:
        raise ConfigError(_unknown_flag(unknown[0], known))
    given = vars(namespace)
    path = given.pop("config", None)
    return (read_yaml(Path(path), known) if path else {}) | given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _build_parser(known: dict[str, Setting]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m training.main",
        description="Train CLIP models on image-text shards.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names; the command line wins over it")
    groups: dict[str, Any] = {}
    for setting in known.values():
        group = groups.get(setting.section) or groups.setdefault(
            setting.section, parser.add_argument_group(setting.section)
        )
        group.add_argument(setting.flag, *setting.aliases, **_argument(setting))
    return parser


def _argument(setting: Setting) -> dict[str, Any]:
    help = setting.help.replace("%", "%%")
    if setting.kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": help, "dest": setting.name}
    if setting.default not in (None, "", ()):
        help += f" (default: {_shown(setting.default)})"
    spec: dict[str, Any] = {"help": help, "dest": setting.name, "type": _Decoder(setting)}
    spec["metavar"] = "{" + ",".join(setting.choices) + "}" if setting.choices else setting.kind.__name__.upper()
    if setting.is_tuple:
        spec |= {"nargs": "+", "action": _StoreTuple}
    return spec


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return repr(default) if default == "\t" else str(default)


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class _Decoder:
    """One command-line word to the setting's type; argparse shows the name in its message."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.__name__ = setting.kind.__name__

    def __call__(self, word: str) -> Any:
        try:
            return decode(self.setting, word)
        except ConfigError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc


def decode(setting: Setting, value: Any) -> Any:
    """`value` (a word, or a YAML scalar) in the setting's element type. Raises ConfigError."""
    kind = setting.kind
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"expected true or false, got {value!r}")
        return value
    if kind is str:
        if value == "" and setting.optional:
            return None
        if not isinstance(value, str):
            raise ConfigError(f"expected text, got {value!r}; quote it")
        if setting.choices and value not in setting.choices:
            raise ConfigError(f"{value!r} is not one of {', '.join(setting.choices)}")
        return value
    return _decode_number(kind, value)


def _decode_number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"expected {'a whole number' if kind is int else 'a number'}, got {value!r}")
    try:
        number = float(value)
        if kind is int and not (number.is_integer() and ("e" in str(value).lower() or float(int(value)) == number)):
            raise ValueError
    except (ValueError, OverflowError):
        raise ConfigError(f"expected {'a whole number' if kind is int else 'a number'}, got {value!r}") from None
    return int(number) if kind is int else number


def read_yaml(path: Path, known: dict[str, Setting] | None = None) -> dict[str, Any]:
    """The settings of a YAML file, decoded. Raises ConfigError naming file, key and what would be valid."""
    known = known or settings()
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as exc:
        raise ConfigError(f"--config {path}: {str(exc).splitlines()[0]}") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a mapping of setting names to values")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {path}: unknown key {key!r}{_nearest(name, known)}")
        try:
            values[name] = _decode_yaml(known[name], value)
        except ConfigError as exc:
            raise ConfigError(f"--config {path}: {key}: {exc}") from exc
    return values


def _decode_yaml(setting: Setting, value: Any) -> Any:
    if value is None and setting.optional:
        return None
    if setting.name == "train_data" and isinstance(value, list):  # a mixture, as its own file would hold it
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()
    if setting.is_tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(decode(setting, item) for item in items)
    return decode(setting, value)


def _unknown_flag(word: str, known: dict[str, Setting]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: every setting is a flag"
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    return f"unknown flag {word.split('=')[0]}{_nearest(name, known, as_flag=True)}"


def _nearest(name: str, known: dict[str, Setting], as_flag: bool = False) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        return "; --help lists them all"
    return f"; did you mean {known[close[0]].flag if as_flag else close[0]}?"
