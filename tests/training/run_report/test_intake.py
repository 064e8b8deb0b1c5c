"""What was read, by source and reason."""

from __future__ import annotations

from training.run_report.intake import SourceIntake, intake_of

COUNTS = {
    "train/skipped_samples": 7,
    "train/skipped_samples/no_caption": 2,
    "train/skipped_samples/truncated_image": 5,
    "train/skipped_shards": 1,
    "train/skipped_shards/missing": 1,
    "train/samples/cc12m": 90,
    "train/samples/laion": 10,
    "train/skips/laion": 7,
    "train/filtered/cc12m": 30,
    "train/epochs/cc12m": 1.2,
}


def test_counts_are_those_of_the_last_record_by_source_and_by_reason() -> None:
    intake = intake_of([{"step": 1, "train/skipped_samples": 0}, {"step": 2, **COUNTS}, {"step": 2, "val/x-top1": 1.0}])
    assert intake is not None
    assert intake.sources == (SourceIntake("cc12m", 90, 0, 30, 1.2), SourceIntake("laion", 10, 7, 0, None))
    assert list(intake.skipped_samples.items()) == [("truncated_image", 5), ("no_caption", 2)]
    assert intake.skipped_shards == {"missing": 1}
    assert (intake.used, intake.skipped) == (100, 7)


def test_records_without_counts_have_no_intake() -> None:
    assert intake_of([{"step": 1, "train/loss": 1.0}]) is None
