"""CLIP_benchmark's own command line as a program of ours, and the figures it writes. Knows no set and no model.

`python -m tests.helpers.clip_benchmark eval ...` is `clip_benchmark eval ...` with one repair: release 1.6.2 gives an
array of one element to `float`, which NumPy 2.4 and later refuse.
"""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.process import Running


def benchmark(task: str, root: Path, model: Path, output: Path, *flags: str) -> dict[str, float]:
    """The figures of the set in `root` with the model exported to `model`, in float32. AssertionError if it fails."""
    command = [
        *(sys.executable, "-m", "tests.helpers.clip_benchmark", "eval", "--task", task, "--output", str(output)),
        *("--dataset", f"wds/{root.name}", "--dataset_root", str(root)),
        *("--model", f"local-dir:{model}", "--pretrained", "in_the_folder"),
        *("--no_amp", "--num_workers", "0", "--batch_size", "16", *flags),
    ]
    Running(command).finish(timeout_s=300).expect(0)
    return dict(json.loads(output.read_text())["metrics"])


def _main() -> None:
    from clip_benchmark import cli
    from clip_benchmark.metrics import zeroshot_classification

    def float_of(value: Any) -> float:
        return builtins.float(np.asarray(value).item())

    zeroshot_classification.float = float_of
    cli.main()


if __name__ == "__main__":
    _main()
