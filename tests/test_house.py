"""The rules of the house, read off the source: directions, prints, docstrings, lengths, top-level names."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.process import ROOT, environment

ROOMS = ("models", "data", "training", "scripts")
FORBIDDEN = {
    "models": {"data", "training", "scripts", "tests"},
    "data": {"models", "training", "scripts", "tests"},
    "training": {"scripts", "tests"},
    "scripts": {"tests"},
}
TOP_LEVEL = {
    "training", "models", "data", "scripts", "slurm", "configs", "tests", "docs", "pyproject.toml",
    "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", ".ci", ".gitignore",
}  # fmt: skip
MAX_FUNCTION_LINES = 70
MAY_PRINT = ("scripts/", "training/console.py")
TEXT_FILES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".txt", ""}
# Homes and workplaces of whoever wrote the file; a reader has neither.
PRIVATE_PATHS = re.compile(r"(?<![\w.])/(work|root|home|Users)/\w|\.\./shared\b")


def _sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imported_packages(path: Path) -> Iterator[str]:
    """Top-level names of all imports, those inside functions too."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def _files_of_the_project() -> list[Path]:
    """What git tracks or would track."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_in_the_allowed_direction_only(room: str) -> None:
    wrong = [
        f"{_name(path)} imports {package}"
        for path in _sources(room)
        for package in _imported_packages(path)
        if package in FORBIDDEN[room]
    ]
    assert not wrong


def test_only_scripts_and_the_console_print() -> None:
    wrong = [
        f"{_name(path)}:{node.lineno}"
        for path in _sources("models", "data", "training")
        if not _name(path).startswith(MAY_PRINT)
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_every_file_says_what_it_is_for() -> None:
    silent = [path for path in _sources(*ROOMS, "tests/helpers") if not ast.get_docstring(_tree(path))]
    assert not [_name(path) for path in silent if path.stat().st_size]


def test_no_function_is_longer_than_a_reader_can_hold() -> None:
    wrong = [
        f"{_name(path)}:{node.lineno} {node.name} has {length} lines"
        for path in _sources(*ROOMS, "tests")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not wrong


def test_the_top_level_holds_the_fixed_names_only() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in _files_of_the_project()}
    assert found <= TOP_LEVEL, f"unexpected: {sorted(found - TOP_LEVEL)}"


def test_no_file_mentions_a_path_of_its_author() -> None:
    wrong = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in _files_of_the_project()
        if path.suffix in TEXT_FILES
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if PRIVATE_PATHS.search(line)
    ]
    assert not wrong


def test_the_readme_has_a_line_for_each_source_file() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    listed, room = set(), ""
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        room = room if line.startswith(" ") else name
        listed.add(room + name if line.startswith(" ") else name)
    present = {_name(path) for path in _sources(*ROOMS) if path.name != "__init__.py"}
    assert {name for name in listed if name.endswith(".py")} == present


@pytest.mark.parametrize("module", ["training.config", "training.cli", "training.main"])
def test_settings_are_read_without_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment()).returncode == 0


def test_help_answers_within_a_second_of_cpu_time() -> None:
    command = [sys.executable, "-m", "training.main", "--help"]
    spent = []
    for _ in range(2):  # the first may compile the byte code
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert shown.returncode == 0
        assert "--clip-grad-norm" in shown.stdout
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 1.0, f"{spent} s"
