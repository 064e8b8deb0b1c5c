"""The panels of a page: which there are, and that each is a self-contained drawing in the page's colours."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from training.plots import COLOURS, Run
from training.run_report.curves import panel_svg, panels_of

LONG = [float(n) for n in range(50_000)]


def _run(*names: str, points: int = 3) -> Run:
    return Run("a <run>", {name: (LONG[:points], [0.1 + n % 7 for n in range(points)]) for name in names})


def test_there_is_a_panel_for_each_kind_of_figure_and_none_for_what_was_not_measured() -> None:
    names = ["train/loss", "val/clip_val_loss", "val/x-zeroshot-top1", "val/x-linear_probe-top1"]
    names += [f"val/{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    titles = [panel.title for panel in panels_of([_run(*names)])]
    retrieval = ["Retrieval, image to text", "Retrieval, text to image"]
    assert titles == ["Loss", "Validation loss", "Zero-shot accuracy", "Linear probe", *retrieval]


def test_a_suite_of_many_sets_is_spread_over_panels() -> None:
    names = [f"val/set{number:02d}-zeroshot-top1" for number in range(14)]
    panels = panels_of([_run(*names)])
    assert [panel.title for panel in panels] == [f"Zero-shot accuracy, {number} of 3" for number in (1, 2, 3)]
    assert [sum(map(panel.wanted, names)) for panel in panels] == [6, 6, 2]


def test_recalls_are_in_the_order_of_their_numbers() -> None:
    (panel,) = panels_of([_run(*(f"val/coco-text_to_image_R@{k}" for k in (1, 5, 10)))])
    assert panel.title == "Retrieval, text to image: coco"
    drawing = panel_svg(panel, [_run(*(f"val/coco-text_to_image_R@{k}" for k in (10, 1, 5)))], "p0")
    assert re.findall(r">(R@\d+)<", drawing) == ["R@1", "R@5", "R@10"]


def test_a_drawing_is_well_formed_and_has_text_and_colours_of_the_page() -> None:
    run = _run(*(f"val/set{number}-zeroshot-top1" for number in range(6)))
    drawing = panel_svg(panels_of([run])[0], [run], "p7")
    root = ElementTree.fromstring(drawing)
    assert root.tag.endswith("svg") and "width" not in root.attrib and "viewBox" in root.attrib
    assert "samples seen" in drawing and "var(--series-6)" in drawing and "font-family" not in drawing
    assert not [colour for colour in COLOURS if colour.lower() in drawing]
    ids = re.findall(r'\bid="([^"]*)"', drawing)
    assert ids and all(name.startswith("p7-") for name in ids)


def test_names_of_runs_and_sets_cannot_break_out_of_a_drawing() -> None:
    run = Run("</svg><script>", {"val/<script>-zeroshot-top1": ([1.0], [0.5])})
    assert "<script>" not in panel_svg(panels_of([run])[0], [run], "p0")


def test_a_curve_of_a_long_run_does_not_make_a_large_page() -> None:
    run = _run("train/loss", points=len(LONG))
    assert len(panel_svg(panels_of([run])[0], [run], "p0")) < 300_000
