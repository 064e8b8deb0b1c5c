"""From a recipe to a folder of averaged weights: checked, scored, chosen, written. Prints nothing.

Uniform and greedy soups are those of Wortsman et al. 2022 (Model soups), the way from a base model is that of Wortsman
et al. 2022 (WiSE-FT). The arithmetic is `models.averaging`'s, the figures are the evaluation's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import models
from models.averaging import Average, Member, common_config
from training.checkpoint_content import MODEL_CONFIG_FILE, MODEL_FILE, versions
from training.distributed import World
from training.errors import CheckpointError, CheckpointWriteError, ConfigError
from training.evaluation.evaluator import Evaluator
from training.evaluation.exam import Exam
from training.evaluation.standalone import newest_of
from training.secrets import mask_secrets
from training.soup_recipe import SoupRecipe, check_recipe, choose_greedily, gain

log = logging.getLogger(__name__)

SOUP_FILE = "soup.json"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint's figures by itself, and the score of the soup of it and those kept before it."""

    source: str
    score: float
    figures: dict[str, float]
    soup_score: float
    kept: bool


@dataclass(frozen=True)
class Mix:
    """The average of the chosen, `alpha` of the way from the base. Without sets there is no score."""

    alpha: float
    score: float | None
    figures: dict[str, float]


@dataclass(frozen=True)
class Soup:
    """What was made, and on what grounds: the content of soup.json."""

    method: str
    metric: str | None
    sets: dict[str, Any]
    members: tuple[Member, ...]
    chosen_alpha: float
    candidates: tuple[Candidate, ...]
    mixes: tuple[Mix, ...]
    notes: tuple[str, ...]


def make_soup(out: Path, recipe: SoupRecipe, exam: Exam, world: World) -> Soup:
    """Chooses, averages and writes the folder `out`, which `--pretrained` and evaluation take. Collective.

    `out` is no checkpoint of a run: it has no manifest, and `--resume` refuses it. Raises ConfigError,
    CheckpointError or DataError, and then leaves no folder.
    """
    check_recipe(recipe, exam.metrics)
    with world.collectively("checkpoints"):
        _check_place(out)
        recipe = _resolved(recipe)
        config, notes = _config_of(recipe)
        everything = Average(config, [Member(source) for source in _sources(recipe)])
    if everything.has_running_statistics:
        notes = [*notes, "running statistics of batch norms are averaged; training a few steps would renew them"]
    tasting = _Tasting(config, recipe.metric or exam.metrics[0], exam, world) if exam.metrics else None
    candidates, chosen = _choose(recipe, tasting)
    mixes, best = _mix(recipe, chosen, tasting)
    soup = Soup(
        method="greedy" if recipe.greedy else "weighted" if recipe.weights else "uniform",
        metric=tasting.metric if tasting else None,
        sets=exam.described(),
        members=tuple(_members(chosen, recipe.base, best.alpha)),
        chosen_alpha=best.alpha,
        candidates=candidates,
        mixes=mixes,
        notes=tuple(notes),
    )
    world.on_main_at_length(lambda: _write(out, config, soup), str(out))
    return soup


# ---- what it is made of


def _check_place(out: Path) -> None:
    if "://" in str(out):
        raise ConfigError(f"{out}: give a local folder; copy it from there to any storage")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists already: name a new folder")


def _resolved(recipe: SoupRecipe) -> SoupRecipe:
    """With the newest checkpoint of each run folder in the folder's place."""
    for source in _sources(recipe):
        if "://" not in source and not Path(source).exists():
            raise CheckpointError(f"{source}: no such file or folder")
    candidates = tuple(newest_of(source) for source in recipe.candidates)
    base = None if recipe.base is None else newest_of(recipe.base)
    return replace(recipe, candidates=candidates, base=base)


def _sources(recipe: SoupRecipe) -> list[str]:
    return [*recipe.candidates, *([] if recipe.base is None else [recipe.base])]


def _config_of(recipe: SoupRecipe) -> tuple[models.ModelConfig, list[str]]:
    """The one model that all sources are, and what is to be said of it."""
    files = {source: Path(source) / MODEL_CONFIG_FILE for source in _sources(recipe)}
    configs = {source: models.load_model_config(str(file)) for source, file in files.items() if file.is_file()}
    if recipe.model is not None:
        configs = {f"--model {recipe.model}": models.load_model_config(recipe.model), **configs}
    if not configs:
        raise ConfigError("--model is needed: of these sources, none is a checkpoint folder, which knows its own")
    return common_config(configs)


# ---- choosing


class _Tasting:
    """Scores averages on the sets, all in one model."""

    def __init__(self, config: models.ModelConfig, metric: str, exam: Exam, world: World) -> None:
        self.metric = metric
        self._world, self._config = world, config
        self._model = models.build_model(config).to(world.device)
        self._known: dict[tuple[Member, ...], dict[str, float]] = {}
        self._evaluator = Evaluator(
            *(exam.sets, exam.data, models.get_tokenizer(config), models.InferenceTransform(config.preprocess), world),
            batch_size=exam.batch_size,
            workers=exam.data.workers,
            precision=exam.precision,
        )

    def figures(self, members: Sequence[Member]) -> dict[str, float]:
        """All figures of the average of `members`; found once. Collective."""
        if tuple(members) not in self._known:
            with self._world.collectively("average"):
                Average(self._config, members).load_into(self._model)
            figures = self._evaluator.evaluate_sets(self._model, list(self._evaluator.tasks), strict=True)
            assert figures is not None, "nobody can ask for a stop here"
            self._known[tuple(members)] = figures
            log.info("%s %.4f: %s", self.metric, figures[self.metric], ", ".join(each.source for each in members))
        return self._known[tuple(members)]

    def score(self, members: Sequence[Member]) -> float:
        return self.figures(members)[self.metric]


def _choose(recipe: SoupRecipe, tasting: _Tasting | None) -> tuple[tuple[Candidate, ...], list[Member]]:
    """The log of a greedy choice, which is empty for others, and the members of the soup."""
    if not recipe.greedy:
        weights = recipe.weights or (1.0,) * len(recipe.candidates)
        return (), [Member(*pair) for pair in zip(recipe.candidates, weights, strict=True)]
    assert tasting is not None, "checked at the start"
    members = [Member(source) for source in recipe.candidates]
    alone = [tasting.score([member]) for member in members]
    with_it = {}

    def together(indices: list[int]) -> float:
        with_it[indices[-1]] = tasting.score([members[index] for index in indices])
        return gain(tasting.metric, with_it[indices[-1]])

    tried = choose_greedily([gain(tasting.metric, score) for score in alone], together)
    candidates = [
        Candidate(
            members[index].source,
            alone[index],
            tasting.figures([members[index]]),
            with_it.get(index, alone[index]),
            kept,
        )
        for index, kept in tried
    ]
    return tuple(candidates), [members[index] for index, kept in tried if kept]


def _mix(recipe: SoupRecipe, chosen: list[Member], tasting: _Tasting | None) -> tuple[tuple[Mix, ...], Mix]:
    """Every alpha with its score, and the best of them: the first of equal ones."""
    if tasting is None:
        unscored = Mix(recipe.alphas[0], None, {})
        return (unscored,), unscored
    members = {alpha: _members(chosen, recipe.base, alpha) for alpha in recipe.alphas}
    mixes = tuple(Mix(alpha, tasting.score(these), tasting.figures(these)) for alpha, these in members.items())
    return mixes, max(mixes, key=lambda mix: gain(tasting.metric, mix.figures[tasting.metric]))


def _members(chosen: list[Member], base: str | None, alpha: float) -> list[Member]:
    """(1 - alpha) x base + alpha x the average of the chosen. The chosen are first: theirs are the whole numbers."""
    total = sum(member.weight for member in chosen)
    members = [Member(member.source, alpha * member.weight / total) for member in chosen]
    return chosen if base is None else [*members, Member(base, 1 - alpha)]


# ---- writing


def _write(out: Path, config: models.ModelConfig, soup: Soup) -> None:
    """The folder appears whole or not at all."""
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    average = Average(config, soup.members)
    account = mask_secrets({**asdict(soup), "versions": versions()})
    try:
        temporary.mkdir(parents=True)
        average.write(temporary / MODEL_FILE)
        _write_text(temporary / MODEL_CONFIG_FILE, json.dumps(config.to_dict(), indent=1))
        _write_text(temporary / SOUP_FILE, json.dumps(account, indent=1))
        temporary.rename(out)
    except OSError as error:
        needed = sum(spec.num_bytes for spec in average.specs.values()) / 2**30
        message = f"cannot write {out}: {error.strerror or error} ({needed:.2f} GiB needed)"
        raise CheckpointWriteError(message) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
