"""Turns parsed YAML or JSON into a frozen dataclass, strictly. Knows no model, no file.

A wrong key or a wrong type is an error that names the dotted path: YAML reads `3e-4` as text and `no`
as a boolean, and a model built from such a value would train wrongly instead of failing.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from models.errors import ConfigError

T = TypeVar("T")

_NOT_THIS_TYPE = object()


def decode(cls: type[T], raw: Any, path: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping; `path` is the dotted prefix used in errors.

    Raises ConfigError for an unknown key (with the nearest known one), a missing one, or a wrong type.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path or cls.__name__}: expected a mapping of settings, got {raw!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in raw:
        if key not in fields:
            raise ConfigError(f"unknown key {prefix}{key}{did_you_mean(str(key), fields)}")
    missing = [name for name, field in fields.items() if name not in raw and _is_required(field)]
    if missing:
        raise ConfigError(f"missing key {prefix}{missing[0]}")
    hints = _hints(cls)  # type: ignore[arg-type]
    return cls(**{key: _decode_value(value, hints[key], prefix + key) for key, value in raw.items()})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known words, then all of them when they are few."""
    names = list(known)
    lowered = {name.lower(): name for name in names}
    near = [lowered[match] for match in difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.5)]
    text = f"; did you mean {' or '.join(near)}?" if near else ""
    return text + (f" Known: {', '.join(names)}" if len(names) <= 60 else "")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _decode_value(value: Any, hint: Any, path: str) -> Any:
    for option in _options(hint):
        decoded = _match(value, option, path)
        if decoded is not _NOT_THIS_TYPE:
            return decoded
    expected = " or ".join(_describe(option) for option in _options(hint))
    raise ConfigError(f"{path}: expected {expected}, got {value!r}{_yaml_trap(value)}")


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _match(value: Any, option: Any, path: str) -> Any:
    if dataclasses.is_dataclass(option) and isinstance(option, type):
        return decode(option, value, path) if isinstance(value, Mapping) else _NOT_THIS_TYPE
    if typing.get_origin(option) is tuple:
        return _match_items(value, typing.get_args(option)[0], path)
    if typing.get_origin(option) is dict:
        return dict(value) if isinstance(value, Mapping) else _NOT_THIS_TYPE
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is option else _NOT_THIS_TYPE


def _match_items(value: Any, item: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        return _NOT_THIS_TYPE
    decoded = tuple(_match(one, item, path) for one in value)
    return _NOT_THIS_TYPE if _NOT_THIS_TYPE in decoded else decoded


def _describe(option: Any) -> str:
    if typing.get_origin(option) is tuple:
        return f"a list of {_describe(typing.get_args(option)[0])}s"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(option, "a mapping")


def _yaml_trap(value: Any) -> str:
    if isinstance(value, bool):
        return " (YAML reads yes, no, on and off as booleans: quote the word)"
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " (YAML reads this as text: write a number with a point, such as 3.0e-4, and without quotes)"
