"""How a checkout is set up: the Makefile's installation step and the pins."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from tests.helpers.process import ROOT, environment

# Stands for Python: makes an environment whose pip notes its arguments and ends with $PIP_EXIT.
FAKE_PYTHON = r"""#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cat > "$3/bin/python" <<'EOS'
#!/bin/sh
case "$*" in
    *pip*) echo "$*" >> "$CLIPYARD_VENV/asked"; exit "$PIP_EXIT" ;;
    *) echo "ran $*" ;;
esac
EOS
    chmod +x "$3/bin/python"
fi
"""


def _make(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    python = folder / "fake-python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    # What a `make test` around this test passes on would change the output.
    settings = {
        "CLIPYARD_VENV": str(folder / "venv"),
        "PYTHON": str(python),
        "PIP_EXIT": "0",
        "MAKEFLAGS": "",
        "MAKELEVEL": "0",
        "ARGS": "",
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment(settings | env), capture_output=True, text=True, timeout=60
    )


def test_packages_are_installed_once_with_the_pins(tmp_path: Path) -> None:
    first, second = _make(tmp_path, "test"), _make(tmp_path, "test")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "once" in first.stdout
    two_at_once = "-n 2 --dist loadfile --no-loadscope-reorder"
    assert second.stdout == f"ran -m pytest {two_at_once} -m not torture and not bench and not (parity and slow)\n"
    (asked,) = (tmp_path / "venv" / "asked").read_text().splitlines()
    assert asked.endswith("-c .ci/constraints.txt -e .[test]")


def test_the_demo_needs_no_test_packages(tmp_path: Path) -> None:
    assert "ran -m scripts.demo" in _make(tmp_path, "demo").stdout
    assert (tmp_path / "venv" / "asked").read_text().endswith("-e .\n")


def test_a_failed_installation_is_tried_again(tmp_path: Path) -> None:
    assert _make(tmp_path, "test", PIP_EXIT="1").returncode != 0
    assert "ran -m pytest" in _make(tmp_path, "test").stdout


def test_a_machine_without_a_fitting_python_gets_one_line(tmp_path: Path) -> None:
    done = _make(tmp_path, "test", "PYTHON=")
    assert done.returncode != 0
    assert "No Python 3.11 or 3.12" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_alone_lists_the_targets(tmp_path: Path) -> None:
    listed = {line.split()[0] for line in _make(tmp_path).stdout.splitlines()}
    assert {"demo", "test", "quick", "check", "torture", "parity", "bench", "clean"} <= listed


def test_every_dependency_has_a_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [entry for entries in project["optional-dependencies"].values() for entry in entries]
    wanted = [*project["dependencies"], *(entry for entry in extras if not entry.startswith(project["name"]))]
    pins = (ROOT / ".ci/constraints.txt").read_text().lower().replace("_", "-")
    missing = [
        name
        for name in (re.split(r"[\[<>=]", entry)[0].lower().replace("_", "-") for entry in wanted)
        if not re.search(rf"^{re.escape(name)}==", pins, re.MULTILINE)
    ]
    assert not missing
