"""The page as a whole: sections in their order, style inside, nothing loaded from elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from training.distributed import World
from training.run_report.curves import curves_section
from training.run_report.gallery import examples_section
from training.run_report.history import History, read_history
from training.run_report.markup import Markup, joined, tag
from training.run_report.sections import data_section, end_of_log, head, results_section, time_section
from training.run_report.selection import ExampleOptions, Findings, find_examples
from training.run_report.settings import settings_section
from training.run_report.words import moment

_STYLE = Path(__file__).with_name("style.css")
# Foreign texts are on the page: a browser is told to run nothing and to fetch nothing, whatever they are.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_report(folders: Sequence[Path], output: Path, options: ExampleOptions, world: World | None = None) -> Path:
    """The page of one or several runs at `output`, replaced in one step. Returns `output`.

    Raises ConfigError for a folder that is no run, and what `find_examples` raises.
    """
    world = world or World()
    histories = [read_history(folder) for folder in folders]
    findings = [find_examples(folder, options, world) for folder in folders] if options.count else []
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(page(histories, findings), encoding="utf-8")
    os.replace(temporary, output)
    return output


def page(histories: Sequence[History], findings: Sequence[Findings]) -> str:
    """The HTML document. findings: of each run, or none at all."""
    title = ", ".join(history.name for history in histories)
    sections = [
        results_section(histories),
        curves_section([history.curves for history in histories]),
        time_section(histories),
        data_section(histories),
        *([examples_section(histories, findings)] if findings else []),
        settings_section(histories),
    ]
    body = tag("body", tag("main", head(histories), *sections, _foot(histories)))
    return f"<!DOCTYPE html>\n{tag('html', _document_head(title), body, lang='en')}\n"


def _document_head(title: str) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"Report: {title}"),
        tag("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )


def _foot(histories: Sequence[History]) -> Markup:
    folders = joined(*(joined(tag("code", history.folder), " ") for history in histories))
    return tag("footer", end_of_log(histories), tag("p", f"Made {moment(time.time())} from ", folders))
