"""One small run for all tests of this room, whose captions and class names are as foreign as texts can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.shards import caption_of, write_shards
from tests.training.evaluation.conftest import CLASSES, write_labelled
from training.main import main

HOSTILE = '<script>document.title = "taken"</script><img src="http://x.invalid/a.png" onerror="alert(1)"> "&amp;'
PASSWORD = "hunter2-in-the-url"


def _captions(index: int) -> str:
    return f"{HOSTILE} {index}" if index == 0 else f"{caption_of(index)}\nanother of {index}"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs on data with two broken samples, evaluated on pairs and on classes."""
    home = tmp_path_factory.mktemp("reported")
    write_shards(home / "train", [16, 16], broken={3: "truncated_image", 20: "no_caption"})
    write_shards(home / "val", [12], captions=_captions)
    write_labelled(home / "classes", counts=(6, 5), classnames=(HOSTILE, *CLASSES[1:]))
    flags = ["--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "8", "--workers", "0"]
    flags += ["--epochs", "2", "--warmup", "1", "--lr", "1e-3", "--log-every-n-steps", "1", "--progress", "lines"]
    flags += ["--train-data", f"{home}/train/shard-{{00000..00001}}.tar", "--train-num-samples", "24"]
    flags += ["--val-data", f"{home}/val/shard-00000.tar", "--zeroshot-data", f"shapes={home}/classes"]
    flags += ["--zeroshot-frequency", "1", "--wandb-notes", f"https://me:{PASSWORD}@host/x", "--logs", str(home)]
    assert main([*flags, "--name", "run"]) == 0
    return home / "run"
