"""`scripts.profile_model`: one count, four forms of it, and its mistakes."""

from __future__ import annotations

import csv
import io
import json

import pytest

from scripts import profile_model

LARGE = ("ViT-L-14-336", "convnext_large_d_320")


def _printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert profile_model.main(argv) == 0
    return capsys.readouterr().out


def test_the_table_is_aligned_and_has_a_line_a_tower(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(capsys, *LARGE).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["ViT-L-14-336", "336x336", "77", tower] for tower in ("image", "text", "total")
    ]
    assert lines[3].split()[4:] == ["427.94", "197.61", "278.19", "149.49"]


def test_csv_and_markdown_hold_the_figures_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = [line.split() for line in _printed(capsys, "tiny-test").splitlines()[1:]]
    rows = list(csv.reader(io.StringIO(_printed(capsys, "tiny-test", "--csv"))))
    assert rows[0][-1] == "Mact fused"
    assert rows[1:] == table
    markdown = _printed(capsys, "tiny-test", "--markdown").splitlines()
    assert [line.strip("| ").split(" | ") for line in markdown[2:]] == table


def test_json_has_whole_numbers_for_the_asked_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--image-size", "32", "64", "--context-length", "8", "--batch-size", "2", "--json")
    (profile,) = json.loads(_printed(capsys, "tiny-test", *flags))
    assert (profile["image_size"], profile["context_length"], profile["batch_size"]) == ([32, 64], 8, 2)
    assert profile["total"]["macs"] == sum(tower["macs"] for tower in profile["towers"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ViT-B-33",), "unknown model 'ViT-B-33'"),
        (("tiny-test", "--image-size", "1"), "smaller than one patch"),
        (("tiny-test", "--image-size", "1", "2", "3"), "a size is one side or (height, width)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
