"""The flags of `training.main` as words of a command line, grouped by setting. Knows no files and no Slurm.

A template's flags are shell text, one flag a line; bash itself expands them, with the variables of whoever submits.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from data.urls import mask_url
from training.cli import settings
from training.errors import ConfigError
from training.secrets import mask_text

CONFIG = "config"  # the flag that names a file of settings; not a setting itself
_FLAG = re.compile(r"(?<![\w=/-])--[a-z][\w-]*")
_SECRET_ABSENT = "a credential is in it, so it is not written here: export it"


@dataclass(frozen=True)
class Flag:
    """One setting as it is written: `("--lr", "3e-4")`, `("--lr=3e-4",)` or `("--no-fsdp",)`."""

    setting: str
    words: tuple[str, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """What stands behind the name, after a space or an equals sign."""
        _, sign, value = self.words[0].partition("=")
        return ((value,) if sign else ()) + self.words[1:]


def flag(setting: str, *values: str) -> Flag:
    """The flag that gives `setting` these values."""
    return Flag(setting, ("--" + setting.replace("_", "-"), *values))


def put(flags: Sequence[Flag], setting: str, *values: str) -> list[Flag]:
    """The flags with other values of `setting`, in its place or at the end."""
    new = flag(setting, *values)
    if all(each.setting != setting for each in flags):
        return [*flags, new]
    return [new if each.setting == setting else each for each in flags]


def words_of(flags: Sequence[Flag]) -> list[str]:
    """The command line that they are."""
    return [word for each in flags for word in each.words]


def group(words: Iterable[str]) -> list[Flag]:
    """The words by setting. They must be known; a setting given twice stands where it was first."""
    names = _settings_by_flag()
    grouped: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if word.startswith("--"):
            current = grouped[names[word.split("=")[0]]] = [word]
        else:
            current.append(word)
    return [Flag(setting, tuple(parts)) for setting, parts in grouped.items()]


def merge(lines: Sequence[str], given: Sequence[Flag], without: Collection[str] = ()) -> list[str]:
    """A template's flag lines with what the user gave: in the place of the same flag, else behind them.

    `without`: settings whose lines are left out. A line with several flags stays; what follows it wins.
    """
    names, rest = _settings_by_flag(), {flag.setting: flag for flag in given}
    merged = []
    for line in lines:
        found = _FLAG.findall(line)
        setting = names.get(found[0], "") if len(found) == 1 else ""
        if replaced := rest.pop(setting, None):
            merged.append(shlex.join(replaced.words))
        elif setting not in without:
            merged.append(line)
    return merged + [shlex.join(flag.words) for flag in rest.values()]


def expand(setup: Sequence[str], lines: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """The words that bash makes of flag lines, after the assignments of `setup`. ConfigError names what is not set."""
    script = "\n".join([*setup, "printf '%s\\0' " + " ".join(lines)])
    done = subprocess.run(
        ["bash", "-c", script], env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        complaint = re.sub(r"^bash: line \d+: ", "", done.stderr.strip().splitlines()[-1])
        raise ConfigError(f"{complaint} (export it, or give its flag behind --)")
    return done.stdout.split("\0")[:-1]


def is_secret(text: str) -> bool:
    """Whether a credential is in `text`."""
    return mask_text(text) != text or mask_url(text) != text


def written(flag: Flag) -> tuple[str, dict[str, str]]:
    """The flag as shell text, and the variables it refers to: credentials are not written down."""
    parts, variables = [], {}
    for number, word in enumerate(flag.words):
        head, sign, value = word.partition("=") if number == 0 else ("", "", word)
        if number == 0 and not sign:
            parts.append(head)
        elif is_secret(value):
            name = flag.setting.upper() + (f"_{number}" if number > 1 else "")
            variables[name] = value
            parts.append(f'{head}{sign}"${{{name}:?{_SECRET_ABSENT}}}"')
        else:
            parts.append(f"{head}{sign}{shlex.quote(value)}")
    return " ".join(parts), variables


def _settings_by_flag() -> dict[str, str]:
    names = {"--" + CONFIG: CONFIG}
    for name, setting in settings().items():
        for word in (setting.flag, *setting.aliases):
            names[word] = name
            if setting.kind is bool:
                names["--no-" + word.removeprefix("--")] = name
    return names
