from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from training.errors import FolderError
from training.evaluation.claim import Claim
from training.evaluation.ledger import Ledger, Measurement
from training.manifest import FileEntry, Manifest

FILES = {"model.safetensors": FileEntry(10, 0xABC), "ema.safetensors": FileEntry(10, 0xDEF)}
MANIFEST = Manifest(step=6, epoch=1, samples_seen=48, files=FILES, written_at=1000.123456789)
SHAPES, AVERAGED = Measurement("shapes", "sha256:1"), Measurement("shapes", "sha256:1", averaged=True)
FIGURES = {"val/shapes-zeroshot-top1": 0.5}


Open = Callable[[], Ledger]


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[Claim]:
    with Claim(tmp_path) as claim:
        yield claim


@pytest.fixture
def opened(tmp_path: Path, claim: Claim) -> Iterator[Open]:
    """Opens the ledger, as often as a test wants it."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(Ledger(tmp_path, claim)))


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_a_record_has_the_form_of_the_runs_own_and_says_what_was_evaluated(tmp_path: Path, opened: Open) -> None:
    opened().write("epoch_1", MANIFEST, SHAPES, FIGURES)
    (record,) = lines(tmp_path)
    assert list(record)[:4] == ["step", "epoch", "samples_seen", "time"]
    assert record.pop("time") is not None
    where = {"step": 6, "epoch": 1, "samples_seen": 48}
    weights = {"checkpoint": "epoch_1", "saved_at": 1000.123456789}
    weights |= {"file": "model.safetensors", "weights": "crc32:00000abc"}
    assert record == where | weights | {"set": "shapes", "prompts": "sha256:1"} | FIGURES


def test_figures_of_the_average_have_names_of_their_own(tmp_path: Path, opened: Open) -> None:
    opened().write("epoch_1", MANIFEST, AVERAGED, FIGURES)
    (record,) = lines(tmp_path)
    assert record["val/ema/shapes-zeroshot-top1"] == 0.5 and "val/shapes-zeroshot-top1" not in record
    assert record["weights"] == "crc32:00000def"


def test_what_is_written_is_not_missing_to_the_next_process_either(tmp_path: Path, opened: Open) -> None:
    ledger = opened()
    assert ledger.missing(MANIFEST, [SHAPES, AVERAGED]) == [SHAPES, AVERAGED]
    ledger.write("epoch_1", MANIFEST, SHAPES, FIGURES)
    for reader in (ledger, opened()):
        assert reader.missing(MANIFEST, [SHAPES, AVERAGED]) == [AVERAGED]


def test_another_set_other_prompts_and_a_step_made_anew_are_missing(tmp_path: Path, opened: Open) -> None:
    ledger = opened()
    ledger.write("epoch_1", MANIFEST, SHAPES, FIGURES)
    others = [Measurement("other", "sha256:1"), replace(SHAPES, fingerprint="sha256:2")]
    assert ledger.missing(MANIFEST, others) == others
    assert ledger.missing(replace(MANIFEST, written_at=1001.0), [SHAPES]) == [SHAPES]


def test_a_torn_last_line_is_cut_off_and_measured_again(tmp_path: Path, opened: Open) -> None:
    ledger = opened()
    for one in (SHAPES, AVERAGED):
        ledger.write("epoch_1", MANIFEST, one, FIGURES)
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(content[:-7])
    again = opened()
    assert again.missing(MANIFEST, [SHAPES, AVERAGED]) == [AVERAGED]
    again.write("epoch_1", MANIFEST, AVERAGED, FIGURES)
    assert [record["file"] for record in lines(tmp_path)] == ["model.safetensors", "ema.safetensors"]


def test_nothing_is_written_without_the_claim(claim: Claim, opened: Open) -> None:
    ledger = opened()
    claim.path.unlink()
    with pytest.raises(FolderError, match="it is gone"):
        ledger.write("epoch_1", MANIFEST, SHAPES, FIGURES)
    assert ledger.path.read_bytes() == b""
