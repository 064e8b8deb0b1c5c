"""A matrix of models and sets as text: Markdown to read, CSV to compute with. Knows no model and no files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from training.evaluation.figures import Figure, mean_of
from training.evaluation.matrix import Cell
from training.evaluation.specs import SetSpec
from training.evaluation.suites import Suite

_MISSING = "–"


@dataclass(frozen=True)
class Row:
    """One line of the table: what it shows, and each model's figure, in the order of the models."""

    title: str
    figures: tuple[Figure | None, ...]


def rows_of(cells: Sequence[Cell], specs: dict[str, SetSpec], suites: Iterable[Suite]) -> list[Row]:
    """The main figures of every set, then the mean of each suite of several sets, where a model has all of them."""
    names = list(dict.fromkeys(cell.candidate for cell in cells))
    found = {(cell.candidate, figure.name): figure for cell in cells for figure in cell.figures}
    rows = [
        Row(figure.removeprefix("val/"), tuple(found.get((name, figure)) for name in names))
        for spec in specs.values()
        for figure in spec.main_figures
    ]
    for suite in suites:
        if len(suite.specs) > 1:
            title = f"mean of {suite.name}, {len(suite.specs)} sets"
            means = [_mean([found.get((name, spec.main_figures[0])) for spec in suite.specs]) for name in names]
            rows.append(Row(title, tuple(means)))
    return rows


def markdown(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """Percent with 95 % intervals, a line for each figure and a column for each model."""
    names = list(dict.fromkeys(cell.candidate for cell in cells))
    lines = [["figure (%)", *names], ["---", *["---:"] * len(names)]]
    lines += [[row.title, *map(_percent, row.figures)] for row in rows]
    text = "\n".join("| " + " | ".join(_escaped(word) for word in line) + " |" for line in lines)
    failed = [f"- {cell.candidate} on {cell.label}: {cell.error}" for cell in cells if cell.error]
    return "\n".join([text, *(["", "Not measured:", "", *failed] if failed else [])]) + "\n"


def csv_text(cells: Sequence[Cell]) -> str:
    """Every figure on a line of its own: model, set, figure, value, low, high; a failure has an error instead."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("model", "set", "figure", "value", "low", "high", "error"))
    for cell in cells:
        for figure in cell.figures:
            interval = ("" if bound is None else repr(bound) for bound in (figure.low, figure.high))
            writer.writerow((cell.candidate, cell.label, figure.name, repr(figure.value), *interval, ""))
        if cell.error:
            writer.writerow((cell.candidate, cell.label, "", "", "", "", cell.error))
    return out.getvalue()


def plain(figures: Iterable[Figure]) -> str:
    """One model's figures, a line each, with their intervals."""
    shown = list(figures)
    width = max((len(figure.name) for figure in shown), default=0)
    return "\n".join(f"{figure.name:<{width}}  {figure.value:.4f}{_interval(figure)}" for figure in shown)


def _interval(figure: Figure) -> str:
    return "" if figure.low is None or figure.high is None else f"  ({figure.low:.4f} to {figure.high:.4f})"


def _percent(figure: Figure | None) -> str:
    if figure is None:
        return _MISSING
    if figure.low is None or figure.high is None:
        return f"{100 * figure.value:.2f}"
    return f"{100 * figure.value:.2f} ({100 * figure.low:.2f} to {100 * figure.high:.2f})"


def _mean(figures: Sequence[Figure | None]) -> Figure | None:
    """Of independent sets: their standard errors add in squares. None where one is missing."""
    known = [figure for figure in figures if figure is not None]
    if len(known) < len(figures):
        return None
    value = sum(figure.value for figure in known) / len(known)
    z = NormalDist().inv_cdf(0.975)
    halves = [((figure.high or figure.value) - (figure.low or figure.value)) / (2 * z) for figure in known]
    return mean_of("mean", value, sum(half**2 for half in halves) ** 0.5 / len(known))


def _escaped(word: str) -> str:
    return word.replace("|", "\\|")
