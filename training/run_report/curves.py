"""The curves of runs as drawings inside the page: SVG whose colours are the page's, in light and in dark.

matplotlib is imported when a page is made, not before.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from training.plots import COLOURS, PANELS, Panel, Run, draw_panel
from training.run_report.markup import Markup, section, tag
from training.run_report.words import figure as in_words

_SIZE_INCHES = (4.6, 3.0)
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: the reader's fonts, found by a search
    "font.size": 9.0,
    "path.simplify_threshold": 0.6,  # a long run's points are many more than the pixels of its panel
}
# What matplotlib writes for the colours that `training.plots` draws with.
_VARIABLES = {
    **{colour.lower(): f"var(--series-{number})" for number, colour in enumerate(COLOURS, 1)},
    "#000000": "var(--ink)",
    "#e6e6e6": "var(--rule)",
    "#808080": "var(--faint)",
    "#595959": "var(--faint)",
}
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r'(\bid="|url\(#|href="#)')
_FONT = re.compile(r"font: ([\d.]+)px [^;\"]*")
_FAMILY = re.compile(r"font-family: [^;\"]*;? ?")
_HEAD = re.compile(r"^.*?(?=<svg\b)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'(<svg\b[^>]*?) (?:width|height)="[^"]*pt"')
_SETS_A_PANEL = 6
_PROBES = Panel(
    "Linear probe",
    "top-1 (%)",
    lambda name: name.endswith("-linear_probe-top1"),
    factor=100,
    from_zero=True,
    label=lambda name: name.removeprefix("val/").removesuffix("-linear_probe-top1"),
)
_RECALL = re.compile(r"val/(?P<set>.*?)(?P<way>text_to_image|image_to_text)_R@(?P<k>\d+)")


def curves_section(runs: Sequence[Run]) -> Markup:
    """All panels that the runs have figures for."""
    figures = [_figure(panel, runs, f"p{number}") for number, panel in enumerate(panels_of(runs))]
    return section("Curves", _legend(runs) if len(runs) > 1 else None, tag("div", *figures, class_="panels"))


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The usual panels, the loss on the validation set, and for each set of pairs its recalls."""
    names = sorted({name for run in runs for name in run.curves})
    usual = [panel for panel in PANELS if any(map(panel.wanted, names))]
    accuracies = usual.pop() if usual and usual[-1].title == PANELS[-1].title else None
    losses = [name for name in names if name.startswith("val/") and name.endswith("clip_val_loss")]
    return [
        *usual,
        *([_loss_panel(losses)] if losses else []),
        *([] if accuracies is None else _by_few_sets(accuracies, names)),
        *([_PROBES] if any(map(_PROBES.wanted, names)) else []),
        *_recall_panels(names),
    ]


def _loss_panel(names: Sequence[str]) -> Panel:
    def label(name: str) -> str:
        return name.removeprefix("val/").removesuffix("clip_val_loss").rstrip("-/") or (
            "pairs" if len(names) > 1 else ""
        )

    return Panel("Validation loss", "contrastive loss (nats)", lambda name: name in names, label=label)


def _by_few_sets(panel: Panel, names: Sequence[str]) -> list[Panel]:
    """A panel for each handful of sets: a suite has dozens."""
    wanted = [name for name in names if panel.wanted(name)]
    parts = [wanted[first : first + _SETS_A_PANEL] for first in range(0, len(wanted), _SETS_A_PANEL)]
    if len(parts) == 1:
        return [panel]
    return [_part_of(panel, part, f"{panel.title}, {number} of {len(parts)}") for number, part in enumerate(parts, 1)]


def _part_of(panel: Panel, names: Sequence[str], title: str) -> Panel:
    return Panel(title, panel.unit, lambda name: name in names, panel.factor, from_zero=True, label=panel.label)


def _recall_panels(names: Sequence[str]) -> list[Panel]:
    found = [match for match in map(_RECALL.fullmatch, names) if match]
    groups = dict.fromkeys((match["set"], match["way"]) for match in found)
    return [_recall_panel(stem, way) for stem, way in groups]


def _recall_panel(stem: str, way: str) -> Panel:
    source, target = way.split("_to_")
    name = stem.rstrip("-/")
    return Panel(
        f"Retrieval, {source} to {target}" + (f": {name}" if name else ""),
        "recall (%)",
        lambda metric: metric.startswith(f"val/{stem}{way}_R@"),
        factor=100,
        from_zero=True,
        label=lambda metric: metric.rpartition("_")[2],
    )


def _figure(panel: Panel, runs: Sequence[Run], prefix: str) -> Markup:
    drawing = panel_svg(panel, runs, prefix)
    return tag("figure", tag("h3", panel.title), tag("div", drawing, role="img", aria_label=_in_words(panel, runs)))


def _in_words(panel: Panel, runs: Sequence[Run]) -> str:
    """What the drawing shows, for those who do not see it: where each curve ends."""
    ends = [
        f"{run.name} {panel.label(name) or name.partition('/')[2]} {in_words(name, values[-1])}"
        for run in runs
        for name, (_, values) in sorted(run.curves.items())
        if panel.wanted(name)
    ]
    return f"{panel.title} over samples seen; at the end: {'; '.join(ends)}"


def panel_svg(panel: Panel, runs: Sequence[Run], prefix: str) -> Markup:
    """One panel as an `svg` element as wide as its place. prefix: what its ids begin with, once on a page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": prefix}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        draw_panel(figure.subplots(), panel, runs)
        figure.savefig(written, format="svg", transparent=True)
    return Markup(_adapted(written.getvalue(), prefix))


def _adapted(svg: str, prefix: str) -> str:
    """matplotlib's file as a part of a page: no prolog, the page's fonts and colours, ids of its own."""
    svg = _METADATA.sub("", _HEAD.sub("", svg))
    svg = _SIZE.sub(r"\1", _SIZE.sub(r"\1", svg))
    svg = _COLOUR.sub(lambda match: _VARIABLES.get(match[0], match[0]), svg)
    svg = _FAMILY.sub("", _FONT.sub(r"font-size: \1px", svg))
    return _REFERENCE.sub(rf"\g<1>{prefix}-", svg)


def _legend(runs: Sequence[Run]) -> Markup:
    """Colours mean runs where there are several."""
    entries = [
        tag("li", tag("span", class_=f"swatch series-{number % len(COLOURS) + 1}", aria_hidden="true"), run.name)
        for number, run in enumerate(runs)
    ]
    return tag("ul", *entries, class_="legend", aria_label="Colours of the runs")
