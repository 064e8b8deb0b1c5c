"""The curves of one or several runs as one picture. Reads `metrics.jsonl`; knows nothing of how it came about.

matplotlib is imported when a picture is asked for: training itself never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training.errors import ConfigError
from training.metrics import FILE_NAME, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart for colour-blind readers, without their yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_SMOOTH_FROM = 60  # points in a curve from which on its running mean is drawn over it

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Panel:
    """One of the pictures: which metrics it shows, under which name, and how."""

    title: str
    unit: str
    wanted: Callable[[str], bool]
    factor: float = 1.0
    smooth: bool = False
    from_zero: bool = False
    label: Callable[[str], str] = lambda name: ""


@dataclass(frozen=True)
class Run:
    """One run's curves: metric -> (samples seen, values)."""

    name: str
    curves: dict[str, Curve]


def _named(*names: str) -> Callable[[str], bool]:
    return lambda name: name in names


PANELS = (
    Panel(
        "Loss",
        "contrastive loss (nats)",
        _named("train/loss", "val/clip_val_loss"),
        smooth=True,
        label=lambda name: "training" if name.startswith("train/") else "validation",
    ),
    Panel("Learning rate", "learning rate", _named("train/lr"), from_zero=True),
    Panel("Temperature", "logit scale", _named("train/logit_scale")),
    Panel("Throughput", "samples per second", _named("train/samples_per_second"), smooth=True, from_zero=True),
    Panel("Gradient norm", "global norm before clipping", _named("train/grad_norm"), smooth=True, from_zero=True),
    Panel(
        "Zero-shot accuracy",
        "top-1 (%)",
        lambda name: name.startswith("val/") and name.endswith("-top1") and "-linear_probe-" not in name,
        factor=100,
        from_zero=True,
        label=lambda name: name.removeprefix("val/").removesuffix("-top1").replace("-zeroshot", "").replace("-val", ""),
    ),
)


def plot_runs(folders: Sequence[Path], output: Path) -> Path:
    """Draws the panels of all runs over samples seen into `output` (PNG by its name). Returns `output`.

    Raises ConfigError for a folder without metrics.
    """
    # The object interface, not pyplot: no global state, no display, no figure left open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [read_run(folder) for folder in folders]
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        draw_panel(axes, panel, runs)
        axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold")
    if len(runs) == 1:
        figure.suptitle(runs[0].name, fontsize=15, fontweight="bold")
    else:
        handles = [_handle(index, run.name) for index, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(runs)), frameon=False, fontsize=11)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    return output


def read_run(folder: Path) -> Run:
    """The curves of a run folder. Raises ConfigError when it holds no metrics."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {FILE_NAME}")
    curves = curves_of(read_records(folder))
    if not curves:
        raise ConfigError(f"{path} holds no metrics yet")
    return Run(folder.resolve().name, curves)


def curves_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """The finite values of every metric over samples seen."""
    curves: dict[str, Curve] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(("train/", "val/")) and isinstance(value, int | float) and math.isfinite(value):
                samples, values = curves.setdefault(name, ([], []))
                samples.append(record["samples_seen"])
                values.append(value)
    return curves


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred running mean whose window is a thirtieth of the curve."""
    reach = max(1, len(values) // 60)
    return [
        sum(window) / len(window) for window in (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    ]


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """The panel's curves of all runs over samples seen, with axes and legend, without its title."""
    unit, divisor = _samples_unit(runs)
    labels = {
        panel.label(name): name for run in runs for name in sorted(run.curves, key=_in_order) if panel.wanted(name)
    }
    for index, run in enumerate(runs):
        for rank, (label, name) in enumerate(labels.items()):
            if name in run.curves:
                colour = COLOURS[(index + (rank if len(runs) == 1 else 0)) % len(COLOURS)]
                style = "-" if len(runs) == 1 else _STYLES[rank % len(_STYLES)]
                samples, values = run.curves[name]
                curve = [x / divisor for x in samples], [y * panel.factor for y in values]
                _draw_curve(axes, curve, colour, style, panel, label, rank)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel(f"samples seen{unit}")
    axes.set_xlim(0, 1.02 * _most_samples(runs) / divisor)
    _tidy(axes, panel)
    if not labels:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="0.5")
    elif any(labels):
        _legend(axes, runs, labels)


def _in_order(name: str) -> tuple[str, int]:
    """By name, and by the number behind it: R@5 before R@10."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)


def _draw_curve(axes: Axes, curve: Curve, colour: str, style: str, panel: Panel, label: str, rank: int) -> None:
    samples, values = curve
    marker = _MARKERS[rank % len(_MARKERS)] if len(values) <= 40 else ""
    if panel.smooth and len(values) >= _SMOOTH_FROM:
        axes.plot(samples, values, color=colour, linewidth=0.8, alpha=0.3)
        values = smoothed(values)
    axes.plot(samples, values, color=colour, linestyle=style, linewidth=1.8, marker=marker, markersize=4, label=label)


def _tidy(axes: Axes, panel: Panel) -> None:
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    # A common factor above the axis would push the title away.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _legend(axes: Axes, runs: Sequence[Run], labels: dict[str, str]) -> None:
    """What the line styles mean; with several runs in grey, because colours mean runs."""
    from matplotlib.lines import Line2D

    handles = axes.get_legend_handles_labels()[0]
    if len(runs) > 1:
        handles = [
            Line2D([], [], color="0.35", linestyle=_STYLES[rank % len(_STYLES)], label=label)
            for rank, label in enumerate(labels)
        ]
    axes.legend(handles=handles, frameon=False, loc="best", fontsize=9)


def _handle(index: int, name: str) -> object:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=COLOURS[index % len(COLOURS)], linewidth=2.5, label=name)


def _samples_unit(runs: Sequence[Run]) -> tuple[str, float]:
    most = _most_samples(runs)
    for unit, divisor in ((" (billions)", 1e9), (" (millions)", 1e6), (" (thousands)", 1e3)):
        if most >= 2 * divisor:
            return unit, divisor
    return "", 1.0


def _most_samples(runs: Sequence[Run]) -> float:
    return max(max(samples) for run in runs for samples, _ in run.curves.values()) or 1.0
