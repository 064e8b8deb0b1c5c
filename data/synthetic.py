"""Generated pairs for trials without data: `--dataset-type synthetic`. Each is a function of its number alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import simplejpeg

from data.errors import DataConfigError
from data.randomness import KeyedRandom
from data.samples import RawSample
from data.urls import Source

SAMPLES_PER_SHARD = 1000

_PREFIX = "synthetic:"
_COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50)}
_PLACES = ("top left", "top right", "bottom left", "bottom right")


def synthetic_shards(num_samples: int) -> tuple[Source, tuple[int, ...]]:
    """A source of `num_samples` generated pairs and the samples in each of its shards."""
    if num_samples < 1:
        raise DataConfigError("--dataset-type synthetic needs --train-num-samples of at least 1")
    firsts = range(0, num_samples, SAMPLES_PER_SHARD)
    counts = tuple(min(SAMPLES_PER_SHARD, num_samples - first) for first in firsts)
    urls = tuple(f"{_PREFIX}{first}-{first + count}" for first, count in zip(firsts, counts, strict=True))
    return Source("synthetic", urls), counts


class SyntheticReader:
    """Reads shards of `synthetic_shards`. Pictures are JPEGs a little larger than the model's `image_size` (h, w)."""

    def __init__(self, image_size: tuple[int, int]):
        self.image_size = image_size

    def read(self, url: str, start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
        """Samples `start` to `stop` of a shard, in order."""
        first, end = map(int, url.removeprefix(_PREFIX).split("-"))
        for number in range(first + start, end if stop is None else min(end, first + stop)):
            yield self._sample(url, number, number - first)

    def _sample(self, shard: str, number: int, index: int) -> RawSample:
        random = KeyedRandom("synthetic", number)
        colour, place = (int(word) % 4 for word in random.words(2))
        height, width = (side + side // 8 for side in self.image_size)
        pixels = np.full((height, width, 3), int(random.uniform(0, 64)), dtype=np.uint8)
        rows = slice(0, height // 2) if place < 2 else slice(height // 2, height)
        columns = slice(0, width // 2) if place % 2 == 0 else slice(width // 2, width)
        name, value = list(_COLOURS.items())[colour]
        pixels[rows, columns] = value
        caption = f"a {name} square at the {_PLACES[place]}, number {number}"
        return RawSample(
            f"{number:09d}", shard, index, {"jpg": simplejpeg.encode_jpeg(pixels), "txt": caption.encode()}
        )
