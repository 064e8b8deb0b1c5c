"""`scripts.average_checkpoints`: from a command to a folder and a table, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from scripts import average_checkpoints, evaluate
from tests.training.evaluation.conftest import write_labelled

QUICK = ("--device", "cpu", "--workers", "1", "--batch-size", "8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoint folders and an OpenCLIP file of another model."""
    root = tmp_path_factory.mktemp("checkpoints")
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = models.create_model("tiny-test")
        (root / f"epoch_{seed}").mkdir()
        save_file(model.state_dict(), root / f"epoch_{seed}" / "model.safetensors")
        (root / f"epoch_{seed}" / "model_config.json").write_text(json.dumps(model.config.to_dict()))
    torch.save(models.create_model("tiny-test-rn").state_dict(), root / "other.pt")
    return [str(root / name) for name in ("epoch_1", "epoch_2", "other.pt")]


def test_a_uniform_soup_is_the_mean(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert average_checkpoints.main([str(tmp_path / "soup"), *folders[:2], "--device", "cpu"]) == 0
    first, second, mean = (load_file(Path(f) / "model.safetensors") for f in (*folders[:2], tmp_path / "soup"))
    expected = (first["visual.proj"].double() + second["visual.proj"].double()) / 2
    assert torch.equal(mean["visual.proj"], expected.float())
    shown = capsys.readouterr().out
    assert f"0.5000  {folders[0]}\n0.5000  {folders[1]}\n" in shown
    assert f"{tmp_path / 'soup'}: the uniform average" in shown


def test_a_greedy_soup_shows_its_choice_and_evaluation_takes_it(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ("--zeroshot-data", f"shapes={write_labelled(tmp_path / 'shapes')}", *QUICK)
    soup = str(tmp_path / "soup")
    assert average_checkpoints.main([soup, *folders[:2], "--greedy", *sets]) == 0
    candidates = json.loads((tmp_path / "soup" / "soup.json").read_text())["candidates"]
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for candidate in candidates:
        kept = "yes" if candidate["kept"] else "no"
        assert [candidate["source"], f"{candidate['score']:.4f}", f"{candidate['soup_score']:.4f}", kept] in shown
    assert ["1", f"{candidates[-1]['soup_score'] if candidates[-1]['kept'] else candidates[0]['score']:.4f}"] in shown
    assert evaluate.main(["--checkpoint", soup, *sets]) == 0


def test_alphas_make_a_table_and_half_way_is_the_default(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [folders[0], "--base", folders[1]]
    assert average_checkpoints.main([str(tmp_path / "half"), *command, "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "half" / "soup.json").read_text())["chosen_alpha"] == 0.5
    capsys.readouterr()
    sets = ("--zeroshot-data", f"shapes={write_labelled(tmp_path / 'shapes')}", *QUICK)
    assert average_checkpoints.main([str(tmp_path / "best"), *command, "--alpha", "0", "0.25", "1", *sets]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table] == ["alpha", "0", "0.25", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{0}", "{1}", "--greedy"], "need sets to score on"),
        (["{0}", "{1}", "--alpha", "0.3"], "--alpha needs --base"),
        (["{0}", "{2}"], "other.pt does not fit model tiny-test"),
        (["{2}"], "--model is needed"),
        (["{0}/gone"], "no such file or folder"),
        (["{0}", "{0}/gone"], "no such file or folder"),
        (["{0}", "--zeroshot-data", "a=nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    folders: list[str], tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tmp_path / "soup"), *(flag.format(*folders) for flag in flags)]
    assert average_checkpoints.main([*command, *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "soup").exists()
