"""The page in a real browser: it shows everything, asks for nothing, runs nothing, and fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.browser import Browser, browser, missing
from tests.training.run_report.conftest import HOSTILE, PASSWORD
from training.run_report import write_report
from training.run_report.selection import ExampleOptions

NARROW, WIDE = 420, 1300


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run."""
    return write_report([finished_run], tmp_path_factory.mktemp("page") / "report.html", ExampleOptions(count=3))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    if reason := missing():
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_a_browser_shows_it_without_complaint_and_without_a_horizontal_bar(
    page: Path, chromium: Browser, width: int, dark: bool
) -> None:
    chromium.open(page, width, dark)
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    light = chromium.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every(c => c > 200)")
    assert light is not dark
    # Every drawing has lines of its own, and every picture is decoded.
    drawn = "[...document.querySelectorAll('.panels svg')].map(e => e.querySelectorAll('path').length > 4)"
    assert chromium.evaluate(drawn) == [True] * 9
    images = chromium.evaluate("[...document.images].map(image => image.naturalWidth > 0 && image.alt.length > 0)")
    assert len(images) == 3 * 5 + 3 + 3 + sum(_added(chromium)) and all(images)
    assert chromium.complaints == []


def _added(chromium: Browser) -> list[int]:
    """Right images that are shown besides the five nearest."""
    return list(chromium.evaluate("[...document.querySelectorAll('.images')].map(list => list.children.length - 5)"))


def test_nothing_is_fetched_from_elsewhere(page: Path, chromium: Browser) -> None:
    chromium.requests.clear()
    chromium.open(page, WIDE)
    foreign = [url for url in chromium.requests if not url.startswith("data:")]
    assert foreign == [page.resolve().as_uri()]


def test_foreign_texts_stay_texts(page: Path, chromium: Browser) -> None:
    chromium.open(page, WIDE)
    assert chromium.evaluate("document.title") == "Report: run"
    assert chromium.evaluate("document.querySelectorAll('script, [onerror], img:not([src^=\"data:\"])').length") == 0
    quotes = chromium.evaluate("[...document.querySelectorAll('q')].map(quote => quote.textContent)")
    assert quotes[0] == f"{HOSTILE} 0"
    assert HOSTILE in chromium.evaluate("document.querySelector('.card .verdict b').textContent")


def test_headings_descend_by_one_and_tables_have_headers(page: Path, chromium: Browser) -> None:
    chromium.open(page, WIDE)
    levels = chromium.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    titles = chromium.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert titles == ["Evaluations", "Curves", "Time", "Data", "Examples", "Configuration"]
    tables = "[...document.querySelectorAll('table')].map(t => !!t.caption && t.querySelectorAll('th').length > 1)"
    assert all(chromium.evaluate(tables))
    assert chromium.evaluate(
        "[...document.querySelectorAll('td.number')].every(c => getComputedStyle(c).textAlign == 'right')"
    )


def test_it_says_what_the_run_is_and_what_was_lost_and_keeps_its_secrets(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for said in (
        "complete",
        "step 6 of 6",
        "undecodable image",
        "no caption",
        "Waiting for data",
        "Evaluations",
        "***@host",
    ):
        assert said in text
    assert PASSWORD not in text


def test_several_runs_share_a_page(finished_run: Path, tmp_path: Path, chromium: Browser) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "train.log"):
        (other / name).write_bytes((finished_run / name).read_bytes())
    settings = (finished_run / "config.yaml").read_text()
    (other / "config.yaml").write_text(settings.replace("lr: 0.001", "lr: 0.5"))
    path = write_report([finished_run, other], tmp_path / "both.html", ExampleOptions(count=0))
    chromium.open(path, NARROW)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= NARROW
    assert chromium.evaluate("document.querySelectorAll('.legend li').length") == 2
    row = "[...document.querySelectorAll('tr')].find(row => row.textContent.startsWith('lr'))"
    assert chromium.evaluate(f"[...{row}.cells].map(cell => cell.textContent)") == ["lr", "0.001", "0.5"]
    assert "Examples" not in chromium.evaluate("document.body.innerText")
