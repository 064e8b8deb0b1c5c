"""What the loader's workers hold: it is bounded, and does not grow with the epochs."""

from __future__ import annotations

import gc
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.background import DaemonPool
from data.batch import LaneCursor
from data.lanes import Lane, LaneReader
from data.loader import TrainLoader
from data.order import Order, block_bytes, read_ahead_bytes
from data.readers import TarReader
from tests.data.faulty_server import serve
from tests.data.test_loader import build, config_of
from tests.helpers.shards import write_shards

MIB = 1 << 20
# Allocators keep pages for later, and batches in flight differ from one look to the next: what may come and go.
SLACK_MIB = 8


def _unique_mib(loader: TrainLoader) -> list[float]:
    """Memory that belongs to each worker alone (USS): what would be free if it ended."""
    found = []
    for process in loader._processes:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        kib = [int(kib) for kib in re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", rollup, re.MULTILINE)]
        found.append(sum(kib) / 1024)
    return found


def _noise(rng: np.random.Generator) -> bytes:
    """A JPEG of some 100 KiB, 200 to 400 pixels a side: no two decode into blocks of equal size."""
    height, width = rng.integers(200, 400, 2)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[Path]]:
    """Shards of JPEGs that do not compress."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr("tests.helpers.shards.encode_image", lambda *_: _noise(rng))
    return lambda shards, samples: write_shards(tmp_path, [samples] * shards)


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True])
def test_workers_stay_as_large_as_they_were(noisy: Callable[[int, int], list[Path]], remote: bool) -> None:
    paths, sizes = noisy(4, 40), (40,) * 4
    with serve() as server:
        server.objects = {f"/{path.name}": path.read_bytes() for path in paths}
        urls = [f"{server.url}/{path.name}" for path in paths] if remote else paths
        config = config_of(urls, sizes=sizes, batch_size=32, image_size=(64, 64), workers=2, shuffle_budget_mib=8)
        looks = []
        with build(config) as loader:
            for epochs in (18, 24):  # the first ones let allocators find their size
                for _ in range(epochs * 5):
                    next(loader)
                looks.append(max(_unique_mib(loader)))
    assert looks[-1] < looks[0] + SLACK_MIB, looks


@pytest.mark.parametrize("budget_mib", [4, 16])
def test_raw_bytes_keep_within_the_budget(noisy: Callable[[int, int], list[Path]], budget_mib: int) -> None:
    """Four lanes as one worker holds them, over shards much larger than the budget."""
    paths, num_lanes = noisy(8, 40), 4
    block = block_bytes(budget_mib, num_lanes, 1)
    order = Order(0, num_lanes, len(paths), None, (40,) * len(paths))
    pool, reader = DaemonPool(num_lanes, "read"), TarReader(read_ahead_bytes(block), 1)
    lanes = []
    for number in range(num_lanes):
        cursor = LaneCursor()
        blocks = LaneReader(order, reader, list(map(str, paths)), number, cursor, block)
        lanes.append(Lane(blocks, cursor, pool))
    gc.collect()
    largest = 0
    for _ in range(160):
        for lane in lanes:
            lane.next_sample()
        held = [lane._block for lane in lanes] + [lane._ahead.result() for lane in lanes]
        largest = max(largest, sum(raw.num_bytes for one in held if one for raw in one.samples if raw is not None))
    assert largest <= budget_mib * MIB * 3 / 4 + num_lanes * 2 * 150_000  # each block ends with a whole sample
