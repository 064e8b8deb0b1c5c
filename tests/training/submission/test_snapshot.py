"""The copy of the code that a job runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from training.errors import ConfigError
from training.submission import snapshot as module
from training.submission.snapshot import snapshot, survey


def _git(root: Path, *arguments: str) -> None:
    person = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(["git", "-C", str(root), *person, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a tracked, a changed, an untracked, an ignored and a deleted file."""
    root = tmp_path / "checkout"
    (root / "training").mkdir(parents=True)
    (root / "slurm").mkdir()
    for name in ("training/main.py", "gone.py", "run.sh"):
        (root / name).write_text("before\n")
    (root / "run.sh").chmod(0o755)
    (root / ".gitignore").write_text("/ignored/\n/slurm/site.sh\n")
    _git(root, "init", "-q", "-b", "main")
    _git(root, "add", ".")
    _git(root, "commit", "-qm", "first")
    (root / "training/main.py").write_text("after\n")
    (root / "new.py").write_text("new\n")
    (root / "gone.py").unlink()
    (root / "ignored").mkdir()
    (root / "ignored/big.bin").write_text("x")
    (root / "slurm/site.sh").write_text("module load cuda\n")
    return root


def _files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_working_tree_is_copied_as_it_is_with_the_sites_file(checkout: Path, tmp_path: Path) -> None:
    code = survey(checkout, without=tmp_path / "logs")
    folder, copied = snapshot(code, tmp_path / "code")
    assert copied
    assert _files(folder) == {
        "training/main.py": "after\n",
        "run.sh": "before\n",
        "new.py": "new\n",
        ".gitignore": "/ignored/\n/slurm/site.sh\n",
        "slurm/site.sh": "module load cuda\n",
    }
    assert os.access(folder / "run.sh", os.X_OK) and not os.access(folder / "new.py", os.X_OK)
    assert "-dirty, branch main" in code.commit
    assert "-before\n+after\n" in code.changes


def test_equal_code_is_copied_once_and_changed_code_anew(checkout: Path, tmp_path: Path) -> None:
    first = snapshot(survey(checkout, without=tmp_path / "logs"), tmp_path / "code")
    assert snapshot(survey(checkout, without=tmp_path / "logs"), tmp_path / "code") == (first[0], False)
    (checkout / "new.py").write_text("newer\n")
    again, copied = snapshot(survey(checkout, without=tmp_path / "logs"), tmp_path / "code")
    assert copied and again != first[0]
    assert (first[0] / "new.py").read_text() == "new\n"


def test_runs_below_the_checkout_are_no_code(checkout: Path) -> None:
    (checkout / "experiments/run").mkdir(parents=True)
    (checkout / "experiments/run/weights").write_text("x")
    assert "experiments/run/weights" in survey(checkout, without=checkout / "logs").files
    assert "experiments/run/weights" not in survey(checkout, without=checkout / "experiments").files


def test_credentials_are_neither_copied_nor_in_the_difference(checkout: Path, tmp_path: Path) -> None:
    secret = "export AWS_SECRET_ACCESS_KEY=geheim\n"
    for name in ("notes.txt", "slurm/site.sh", "training/main.py"):
        (checkout / name).write_text(secret)
    code = survey(checkout, without=tmp_path / "logs")
    assert set(code.left_out) == {"notes.txt", "slurm/site.sh"}
    assert not {"notes.txt", "slurm/site.sh"} & set(code.files)
    assert "AWS_SECRET_ACCESS_KEY=***" in code.changes and "geheim" not in code.changes


def test_data_in_the_checkout_is_refused_by_name(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_UNTRACKED_MIB", 1)
    (checkout / "shard.tar").write_bytes(bytes(3 << 20))
    with pytest.raises(ConfigError, match=r"holds 3 MiB that git neither tracks nor ignores.*shard.tar.*\.gitignore"):
        survey(checkout, without=tmp_path / "logs")


def test_without_git_the_packages_are_copied(tmp_path: Path) -> None:
    root = tmp_path / "installed"
    for name in ("training/main.py", "training/__pycache__/main.pyc", "slurm/env.sh", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    code = survey(root, without=tmp_path / "logs")
    assert (code.files, code.commit, code.changes) == (("slurm/env.sh", "training/main.py"), "no git checkout", "")


def test_a_copy_that_fails_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    code = survey(checkout, without=tmp_path / "logs")
    (checkout / "new.py").unlink()
    with pytest.raises(FileNotFoundError):
        snapshot(code, tmp_path / "code")
    assert list((tmp_path / "code").iterdir()) == []
