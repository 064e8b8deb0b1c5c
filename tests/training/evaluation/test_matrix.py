"""Models times sets: nothing is measured twice, nothing is taken for what it is not, and the table says it all."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from tests.training.evaluation.conftest import write_labelled
from training.config import EvalConfig
from training.distributed import World
from training.errors import CheckpointError, ConfigError
from training.evaluation import matrix
from training.evaluation.exam import Exam
from training.evaluation.figures import Figure, share
from training.evaluation.matrix import Candidate, Cell, measure_matrix
from training.evaluation.suites import load_suite
from training.evaluation.table import csv_text, markdown, rows_of


def write_model(folder: Path, seed: int) -> str:
    folder.mkdir()
    torch.manual_seed(seed)
    model = models.create_model("tiny-test")
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps(model.config.to_dict()))
    return str(folder)


@pytest.fixture
def candidates(tmp_path: Path) -> list[Candidate]:
    return [Candidate(name, write_model(tmp_path / name, seed)) for seed, name in enumerate("ab")]


@pytest.fixture
def exam(tmp_path: Path) -> Exam:
    entries = [f"{name}={write_labelled(tmp_path / name, counts)}" for name, counts in (("x", (5,)), ("y", (4, 2)))]
    return Exam(sets=EvalConfig(zeroshot_data=tuple(entries)), batch_size=4)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints that are loaded, as they are."""
    names: list[str] = []
    real = matrix.open_candidate

    def noting(checkpoint: str, *args: object, **options: object) -> object:
        names.append(Path(checkpoint).name)
        return real(checkpoint, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matrix, "open_candidate", noting)
    return names


def test_every_model_is_measured_on_every_set(candidates: list[Candidate], exam: Exam) -> None:
    cells = measure_matrix(candidates, exam, World())
    assert [(cell.candidate, cell.label) for cell in cells] == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert all(cell.figures[0].low is not None for cell in cells)


def test_what_the_results_file_has_is_not_measured_again(
    candidates: list[Candidate], exam: Exam, tmp_path: Path, loaded: list[str]
) -> None:
    file = tmp_path / "results.jsonl"
    first = measure_matrix(candidates, exam, World(), file)
    lines = file.read_text().splitlines()
    # A kill in the middle of the third line.
    file.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    loaded.clear()
    assert measure_matrix(candidates, exam, World(), file) == first
    assert loaded == ["b"]
    assert [json.loads(line)["set"] for line in file.read_text().splitlines()] == ["x", "y", "x", "y"]
    loaded.clear()
    assert measure_matrix(candidates, exam, World(), file) == first
    assert loaded == []


def test_other_weights_or_other_prompts_are_measured_anew(
    candidates: list[Candidate], exam: Exam, tmp_path: Path, loaded: list[str]
) -> None:
    file = tmp_path / "results.jsonl"
    measure_matrix(candidates, exam, World(), file)
    loaded.clear()
    torch.manual_seed(7)
    save_file(models.create_model("tiny-test").state_dict(), Path(candidates[0].checkpoint) / "model.safetensors")
    measure_matrix(candidates, exam, World(), file)
    assert loaded == ["a"]
    (tmp_path / "x" / "zeroshot_classification_templates.txt").write_text("one {c}\n")
    measure_matrix(candidates, exam, World(), file)
    assert loaded == ["a", "a", "b"]
    assert len(file.read_text().splitlines()) == 4 + 2 + 2


def test_a_set_that_breaks_in_the_middle_costs_only_its_own_cells(candidates: list[Candidate], tmp_path: Path) -> None:
    sets = (f"x={write_labelled(tmp_path / 'x', (9,), broken=8)}", f"y={write_labelled(tmp_path / 'y', (5,))}")
    file = tmp_path / "results.jsonl"
    cells = measure_matrix(candidates, Exam(sets=EvalConfig(zeroshot_data=sets), batch_size=4), World(), file)
    assert [cell.error is None for cell in cells] == [False, True, False, True]
    assert "s0000008" in (cells[0].error or "")
    assert len(file.read_text().splitlines()) == 2


def test_a_missing_model_is_refused_before_any_set_is_read(candidates: list[Candidate]) -> None:
    exam = Exam(sets=EvalConfig(zeroshot_data=("x=/nowhere",)))
    bare = Candidate("bare", candidates[0].checkpoint + "/nothing.pt")
    with pytest.raises((ConfigError, CheckpointError), match="--model is needed"):
        measure_matrix([candidates[0], bare], exam, World())


# ---- the table


@pytest.fixture
def cells() -> list[Cell]:
    def of(name: str, label: str, top1: float) -> Cell:
        return Cell(name, label, (share(f"val/{label}-zeroshot-top1", top1, 100),))

    return [of("a", "x", 0.5), of("a", "y", 0.7), of("b|c", "x", 0.25), Cell("b|c", "y", error="it broke")]


def test_the_table_has_intervals_means_and_failures(cells: list[Cell], tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("root: r\nsets: [{name: x}, {name: y}]\n")
    suite = load_suite(str(tmp_path / "two.yaml"))
    text = markdown(cells, rows_of(cells, {spec.label: spec for spec in suite.specs}, [suite]))
    lines = text.splitlines()
    assert lines[0] == "| figure (%) | a | b\\|c |"
    assert lines[2] == "| x-zeroshot-top1 | 50.00 (40.38 to 59.62) | 25.00 (17.55 to 34.30) |"
    assert lines[3].endswith("| –  |".replace("  ", " "))
    assert lines[4].startswith("| mean of two, 2 sets | 60.00 (")
    assert lines[4].endswith("| – |")
    assert lines[-1] == "- b|c on y: it broke"


def test_a_mean_is_surer_than_its_parts(cells: list[Cell], tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("root: r\nsets: [{name: x}, {name: y}]\n")
    suite = load_suite(str(tmp_path / "two.yaml"))
    *_, mean = rows_of(cells[:2], {spec.label: spec for spec in suite.specs}, [suite])
    (figure,) = mean.figures
    assert figure is not None
    assert figure.value == pytest.approx(0.6)
    # Two standard errors of 0.05 and 0.046 make one of 0.034.
    assert 0.05 < (figure.high or 0) - figure.value < 0.075


def test_csv_has_every_figure_to_the_last_digit(cells: list[Cell]) -> None:
    rows = list(csv.DictReader(csv_text(cells).splitlines()))
    assert float(rows[0]["low"]) == cells[0].figures[0].low
    assert rows[-1] == dict.fromkeys(rows[-1], "") | {"model": "b|c", "set": "y", "error": "it broke"}


def test_a_figure_without_an_interval_stands_alone() -> None:
    cell = Cell("a", "x", (Figure("val/x-image_to_text_mean_rank", 2.0),))
    assert list(csv.reader(csv_text([cell]).splitlines()))[1][3:6] == ["2.0", "", ""]
