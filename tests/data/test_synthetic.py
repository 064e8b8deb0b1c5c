from __future__ import annotations

import numpy as np
import pytest

from data.decode import decode_rgb
from data.errors import DataConfigError
from data.synthetic import SAMPLES_PER_SHARD, SyntheticReader, synthetic_shards


def test_shards_hold_the_wanted_number_of_samples() -> None:
    source, counts = synthetic_shards(2 * SAMPLES_PER_SHARD + 7)
    assert counts == (SAMPLES_PER_SHARD, SAMPLES_PER_SHARD, 7)
    last = list(SyntheticReader((16, 16)).read(source.urls[-1]))
    assert [raw.index for raw in last] == list(range(7))
    assert len({raw.fields["txt"] for raw in last}) == 7


def test_a_sample_is_a_function_of_its_number_alone() -> None:
    source, _ = synthetic_shards(50)
    whole = list(SyntheticReader((32, 24)).read(source.urls[0]))
    assert list(SyntheticReader((32, 24)).read(source.urls[0], start=20, stop=25)) == whole[20:25]


def test_pictures_are_of_the_models_proportions_and_show_what_the_caption_says() -> None:
    source, _ = synthetic_shards(20)
    for raw in SyntheticReader((64, 32)).read(source.urls[0]):
        pixels = decode_rgb(raw.fields["jpg"], 10**6).astype(int)
        assert pixels.shape == (72, 36, 3)
        caption = raw.fields["txt"].decode()
        rows = slice(0, 30) if "top" in caption else slice(42, 72)
        columns = slice(0, 14) if "left" in caption else slice(22, 36)
        red, green, blue = pixels[rows, columns].mean((0, 1))
        seen = {"red": red - max(green, blue), "green": green - max(red, blue), "blue": blue - max(red, green)}
        colour = caption.split()[1]
        assert colour == "yellow" or max(seen, key=lambda name: seen[name]) == colour
        assert np.ptp(pixels) > 60


def test_a_set_without_samples_is_refused() -> None:
    with pytest.raises(DataConfigError, match="--train-num-samples"):
        synthetic_shards(0)
