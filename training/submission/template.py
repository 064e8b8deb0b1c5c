"""The sbatch templates as text: which there are, what is in one, and the script of one run. Submits nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from training.errors import ConfigError

PROGRAM = "training.main"
_MARK = "#SBATCH "
_SHORT = {
    "nodes": "-N",
    "time": "-t",
    "partition": "-p",
    "account": "-A",
    "qos": "-q",
    "job-name": "-J",
    "output": "-o",
    "chdir": "-D",
    "dependency": "-d",
}


@dataclass(frozen=True)
class Template:
    """An sbatch file by its parts, in their order; `flags` are shell text, one flag a line, without `"$@"`."""

    name: str
    directives: tuple[str, ...]
    setup: tuple[str, ...]
    launch: tuple[str, ...]
    flags: tuple[str, ...]
    ending: tuple[str, ...]

    @property
    def assignments(self) -> tuple[str, ...]:
        """The lines of `setup` that only set variables: flags may refer to them."""
        return tuple(line for line in self.setup if _is_assignment(line))

    def option(self, name: str) -> str | None:
        """The value of one of sbatch's options, e.g. "nodes"."""
        for directive in self.directives:
            if _names(directive, name):
                return directive.removeprefix("--" + name).removeprefix(_SHORT.get(name, "")).lstrip("= ")
        return None


def template_names(folder: Path) -> list[str]:
    """The names that `read_template` takes, for help and errors."""
    return sorted(path.stem for path in folder.glob("*.sbatch") if PROGRAM in path.read_text(errors="replace"))


def read_template(name: str, folder: Path) -> Template:
    """A template of `folder` by its name (`train_` may be left out), or any sbatch file by its path. ConfigError."""
    paths = [folder / f"{prefix}{name}.sbatch" for prefix in ("", "train_")] + [Path(name)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        known = ", ".join(template_names(folder))
        raise ConfigError(f"no template {name!r}: take one of {known}, or the path of an sbatch file")
    try:
        return parse_template(path.name, path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def parse_template(name: str, text: str) -> Template:
    """The parts of an sbatch file. ConfigError when it does not start `training.main` with room for flags."""
    lines = text.splitlines()
    program = next((i for i, line in enumerate(lines) if PROGRAM in line and not line.lstrip().startswith("#")), None)
    if program is None or not text.startswith("#!"):
        raise ConfigError(f"{name}: not an sbatch file that starts python -m {PROGRAM}")
    first = last = program
    while lines[first - 1].endswith("\\"):
        first -= 1
    while lines[last].endswith("\\"):
        last += 1
    head = [line for line in lines[1:first] if not line.startswith("#")]
    before, _, behind = lines[program].partition(PROGRAM)
    flags = [line.rstrip("\\").strip() for line in (behind, *lines[program + 1 : last + 1])]
    if '"$@"' not in flags[-1]:
        raise ConfigError(f'{name}: the command of {PROGRAM} must end with "$@", the place of further flags')
    flags[-1] = flags[-1].replace('"$@"', "").strip()
    return Template(
        name,
        tuple(line.removeprefix(_MARK).strip() for line in lines[:first] if line.startswith(_MARK)),
        tuple(head[_leading_blanks(head) :]),
        (*lines[first:program], before + PROGRAM),
        tuple(line for line in flags if line),
        tuple(lines[last + 1 :]),
    )


def with_options(template: Template, options: Mapping[str, str], further: Sequence[str] = ()) -> Template:
    """Options of sbatch in the template's place or added; `further` are whole ones such as `--gres=none`."""
    directives = list(template.directives)
    for name, value in options.items():
        _put(directives, name, f"--{name}={shlex.quote(value)}")
    for option in further:
        _put(directives, option.lstrip("-").partition("=")[0].partition(" ")[0], option)
    return replace(template, directives=tuple(directives))


def as_link(template: Template) -> Template:
    """The template as one job of a chain: it waits for those of its name before it, and is never requeued."""
    kept = [line for line in template.directives if line not in ("--requeue", "--no-requeue")]
    ending = tuple(re.sub(r"^finish ", "finish_link ", line) for line in template.ending)
    if not any(line.startswith("finish_link ") for line in ending):
        raise ConfigError(f"{template.name}: --chain needs a template that ends with: finish $?")
    others = [each for each in (template.option("dependency") or "").split(",") if each not in ("", "singleton")]
    link = replace(template, directives=(*kept, "--no-requeue"), ending=ending)
    return with_options(link, {"dependency": ",".join(["singleton", *others])})


def script(template: Template, heading: Sequence[str], variables: Mapping[str, str], flags: Sequence[str]) -> str:
    """The sbatch file of one run. `variables` are set before all else; `flags` are shell text, one a line."""
    setup = [line for line in template.setup if not line.startswith(("NAME=", "LOGS="))]
    ours = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    lines = [
        "#!/bin/bash",
        *(f"# {line}" for line in heading),
        *(_MARK + directive for directive in template.directives),
        "",
        *ours,
        *setup,
        *template.launch[:-1],
        template.launch[-1] + " \\",
        *(f"    {flag} \\" for flag in flags),
        '    "$@"',
        *template.ending,
    ]
    return "\n".join(lines) + "\n"


def _is_assignment(line: str) -> bool:
    name, sign, _ = line.removeprefix("export ").partition("=")
    return bool(sign) and name.replace("_", "").isalnum() and name == name.upper()


def _names(directive: str, name: str) -> bool:
    short = _SHORT.get(name)
    return (
        directive == "--" + name
        or directive.startswith((f"--{name}=", f"--{name} "))
        or bool(short and directive.startswith(short))
    )


def _put(directives: list[str], name: str, line: str) -> None:
    for i, directive in enumerate(directives):
        if _names(directive, name):
            directives[i] = line
            return
    directives.append(line)


def _leading_blanks(lines: Sequence[str]) -> int:
    return next((i for i, line in enumerate(lines) if line.strip()), len(lines))
