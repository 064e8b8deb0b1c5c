"""From checkpoints to a folder: scores as evaluation gives them, the choice, and the folder's uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from tests.helpers.gloo import run_ranks
from tests.helpers.shards import write_shards
from tests.training.evaluation.conftest import write_labelled
from training.config import ClusterConfig, DataConfig, EvalConfig
from training.distributed import World, session
from training.errors import CheckpointError, CheckpointWriteError, ConfigError
from training.evaluation.exam import Exam
from training.evaluation.standalone import evaluate_checkpoint
from training.soup import Soup, make_soup
from training.soup_recipe import SoupRecipe
from training.start import choose_start

LOSS = "val/clip_val_loss"


def _checkpoint(folder: Path, seed: int, model: str = "tiny-test") -> str:
    torch.manual_seed(seed)
    built = models.create_model(model)
    folder.mkdir(parents=True)
    save_file(built.state_dict(), folder / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps(built.config.to_dict()))
    return str(folder)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Three checkpoints."""
    root = tmp_path_factory.mktemp("candidates")
    return tuple(_checkpoint(root / f"epoch_{seed}", seed) for seed in (1, 2, 3))


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Exam:
    """A labelled set, and pairs."""
    root = tmp_path_factory.mktemp("sets")
    write_shards(root / "pairs", [9])
    sets = EvalConfig(zeroshot_data=(f"shapes={write_labelled(root / 'shapes')}",))
    return Exam(sets=sets, data=DataConfig(val_data=str(root / "pairs"), workers=1), batch_size=8)


def _figures(checkpoint: Path | str, exam: Exam) -> dict[str, float]:
    return evaluate_checkpoint(str(checkpoint), None, exam.sets, exam.data, World(), exam.batch_size, exam.precision)


def _weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_a_greedy_choice_goes_by_the_scores_that_evaluation_gives(
    candidates: tuple[str, ...], exam: Exam, tmp_path: Path
) -> None:
    recipe = SoupRecipe(candidates=candidates, greedy=True, metric=LOSS)
    soup = make_soup(tmp_path / "soup", recipe, exam, World())
    alone = {source: _figures(source, exam) for source in candidates}
    assert {each.source: each.figures for each in soup.candidates} == alone
    assert [each.score for each in soup.candidates] == sorted(figures[LOSS] for figures in alone.values())
    kept = [soup.candidates[0]]
    for number, candidate in enumerate(soup.candidates[1:]):
        sources = tuple(each.source for each in (*kept, candidate))
        make_soup(tmp_path / f"with_{number}", SoupRecipe(candidates=sources), Exam(), World())
        assert candidate.soup_score == _figures(tmp_path / f"with_{number}", exam)[LOSS]
        assert candidate.kept == (candidate.soup_score <= kept[-1].soup_score)
        kept += [candidate] if candidate.kept else []
    assert [member.source for member in soup.members] == [each.source for each in kept]
    assert soup.mixes[0].figures == _figures(tmp_path / "soup", exam)


def test_the_folder_says_how_it_came_about_but_no_secrets(candidates: tuple[str, ...], tmp_path: Path) -> None:
    labelled = write_labelled(tmp_path / "sets" / "token=1234")
    exam = Exam(sets=EvalConfig(zeroshot_data=(f"shapes={labelled}",)), batch_size=8)
    soup = make_soup(tmp_path / "deep" / "soup", SoupRecipe(candidates=candidates[:2], greedy=True), exam, World())
    written = json.loads((tmp_path / "deep" / "soup" / "soup.json").read_text())
    assert (written["method"], written["metric"]) == ("greedy", "val/shapes-zeroshot-top1")
    assert [each["score"] for each in written["candidates"]] == [each.score for each in soup.candidates]
    assert written["sets"] == {"zeroshot_data": [f"shapes={tmp_path}/sets/token=***"]}
    assert written["versions"]["torch"] == torch.__version__
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["soup"]


def test_weights_and_a_base_are_one_weighted_mean(candidates: tuple[str, ...], tmp_path: Path) -> None:
    recipe = SoupRecipe(candidates=candidates[:2], weights=(1.0, 3.0), base=candidates[2], alphas=(0.2,))
    soup = make_soup(tmp_path / "soup", recipe, Exam(), World())
    assert [member.weight for member in soup.members] == pytest.approx([0.05, 0.15, 0.8])
    first, second, base = (_weights(source)["visual.proj"].double() for source in candidates)
    expected = 0.8 * base + 0.2 * (first + 3 * second) / 4
    torch.testing.assert_close(_weights(tmp_path / "soup")["visual.proj"], expected.float(), rtol=1e-6, atol=1e-7)


def test_the_ends_of_the_way_from_a_base_are_the_models_themselves(candidates: tuple[str, ...], tmp_path: Path) -> None:
    for alpha, source in ((0.0, candidates[1]), (1.0, candidates[0])):
        recipe = SoupRecipe(candidates=candidates[:1], base=candidates[1], alphas=(alpha,))
        make_soup(tmp_path / f"{alpha}", recipe, Exam(), World())
        found, expected = _weights(tmp_path / f"{alpha}"), _weights(source)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_of_several_alphas_the_best_is_written_and_all_are_told(
    candidates: tuple[str, ...], exam: Exam, tmp_path: Path
) -> None:
    recipe = SoupRecipe(candidates=candidates[:1], base=candidates[1], alphas=(0.0, 0.5, 1.0), metric=LOSS)
    soup = make_soup(tmp_path / "soup", recipe, exam, World())
    assert [mix.alpha for mix in soup.mixes] == [0.0, 0.5, 1.0]
    best = min(soup.mixes, key=lambda mix: mix.figures[LOSS])
    assert soup.chosen_alpha == best.alpha
    assert _figures(tmp_path / "soup", exam) == best.figures


def test_every_metric_that_can_be_asked_for_is_a_figure_of_the_evaluation(
    candidates: tuple[str, ...], exam: Exam
) -> None:
    assert set(exam.metrics) <= _figures(candidates[0], exam).keys()


def test_a_soup_is_pretrained_weights_and_no_checkpoint_of_a_run(candidates: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "epoch_9"
    make_soup(folder, SoupRecipe(candidates=candidates), Exam(), World())
    model = models.create_model("tiny-test", pretrained=str(folder))
    assert torch.equal(model.visual.proj, _weights(folder)["visual.proj"])
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        choose_start(tmp_path / "run", resume=str(folder), pretrained=None)


def test_run_folders_stand_for_their_newest_and_files_need_a_model(candidates: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="the run has no checkpoint yet"):
        make_soup(tmp_path / "soup", SoupRecipe(candidates=(str(tmp_path / "run"),)), Exam(), World())
    files = tuple(f"{source}/model.safetensors" for source in candidates)
    with pytest.raises(ConfigError, match="--model is needed"):
        make_soup(tmp_path / "soup", SoupRecipe(candidates=files), Exam(), World())
    make_soup(tmp_path / "soup", SoupRecipe(candidates=files, model="tiny-test"), Exam(), World())
    assert json.loads((tmp_path / "soup" / "model_config.json").read_text())["name"] == "tiny-test"


def test_batch_norms_are_mentioned(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "rn", 1, "tiny-test-rn")
    soup = make_soup(tmp_path / "soup", SoupRecipe(candidates=(source,)), Exam(), World())
    assert "running statistics of batch norms are averaged" in soup.notes[0]


def test_no_folder_is_written_over(candidates: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="epoch_2 exists already"):
        make_soup(Path(candidates[1]), SoupRecipe(candidates=candidates), Exam(), World())


def test_a_disk_that_refuses_leaves_nothing(
    candidates: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointWriteError, match=r"soup: No space left on device \(0\.01 GiB needed\)"):
        make_soup(tmp_path / "soup", SoupRecipe(candidates=candidates), Exam(), World())
    assert list(tmp_path.iterdir()) == []


def test_a_member_that_breaks_midway_leaves_nothing(candidates: tuple[str, ...], tmp_path: Path) -> None:
    broken = _checkpoint(tmp_path / "broken", 4)
    state = _weights(broken)
    state["ln_final.bias"][0] = float("nan")
    save_file(state, Path(broken) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"broken: ln_final\.bias has values that are not finite"):
        make_soup(tmp_path / "soup", SoupRecipe(candidates=(*candidates, broken)), Exam(), World())
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def _on_a_rank(out: Path, recipe: SoupRecipe, exam: Exam) -> Soup:
    with session(ClusterConfig(device="cpu")) as world:
        return make_soup(out, recipe, exam, world)


@pytest.mark.slow
def test_two_ranks_choose_and_write_what_one_does(candidates: tuple[str, ...], exam: Exam, tmp_path: Path) -> None:
    recipe = SoupRecipe(candidates=candidates, greedy=True, metric=LOSS)
    alone = make_soup(tmp_path / "one", recipe, exam, World())
    assert run_ranks(_on_a_rank, 2, tmp_path / "two", recipe, exam) == [alone, alone]
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()
