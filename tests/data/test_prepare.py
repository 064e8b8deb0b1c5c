from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest
import torch

from data.augment import AugmentConfig, sample_crop
from data.captions import CaptionConfig
from data.decode import decode_rgb, resize_crop
from data.prepare import Prepared, Preparer
from data.randomness import KeyedRandom
from data.samples import RawSample, SampleError
from scripts.benchmark_pictures import photo
from tests.data.pictures import encode, jpeg, picture


@dataclass(frozen=True)
class Config:
    image_size: tuple[int, int] = (32, 32)
    interpolation: str = "bicubic"
    aug: AugmentConfig = AugmentConfig(re_prob=0.5, color_jitter=0.4)
    captions: CaptionConfig = CaptionConfig()
    max_image_pixels: int = 10**6
    image_decode: str = "exact"


def sample(**fields: bytes) -> RawSample:
    return RawSample("k", "s.tar", 0, fields)


GOOD = sample(jpg=jpeg(), txt=b"a wave")


def equal(a: Prepared, b: Prepared) -> bool:
    same_draws = a.draws.keys() == b.draws.keys() and all(torch.equal(a.draws[key], b.draws[key]) for key in a.draws)
    return torch.equal(a.image, b.image) and a.caption == b.caption and same_draws


def test_a_sample_becomes_pixels_caption_and_draws() -> None:
    prepared = Preparer(Config(image_size=(24, 40))).prepare(GOOD, (0, 1))
    assert prepared.image.dtype == torch.uint8
    assert prepared.image.shape == (3, 24, 40)
    assert prepared.caption == "a wave"
    assert set(prepared.draws) == {"jitter", "erase"}


def test_it_is_a_crop_without_flip() -> None:
    config = Config(aug=AugmentConfig(scale=(0.3, 0.5)))
    for key in range(10):
        prepared = Preparer(config).prepare(GOOD, (key,))
        pixels = decode_rgb(GOOD.fields["jpg"], 10**6)
        box = sample_crop(*pixels.shape[:2], config.aug, KeyedRandom("prepare", key))
        assert torch.equal(prepared.image, resize_crop(pixels, box, (32, 32), "bicubic"))


def test_the_draws_follow_the_key_alone() -> None:
    """Neither the worker nor what it did before has a say."""
    worker = Preparer(Config())
    first = [worker.prepare(GOOD, (0, lane, index)) for lane in range(3) for index in range(3)]
    other = pickle.loads(pickle.dumps(worker))
    again = [other.prepare(GOOD, (0, lane, index)) for lane in reversed(range(3)) for index in reversed(range(3))]
    assert all(equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert not torch.equal(first[0].image, first[1].image)


@pytest.mark.parametrize("use_timm", [False, True])
def test_both_paths_take_the_same_crop(use_timm: bool) -> None:
    plain = Preparer(Config(aug=AugmentConfig())).prepare(GOOD, (1,))
    assert equal(plain, Preparer(Config(aug=AugmentConfig(use_timm=use_timm))).prepare(GOOD, (1,)))


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_the_picture_is_found_under_any_known_extension(extension: str) -> None:
    formats = {"jpg": "JPEG", "jpeg": "JPEG"}
    data = encode(picture(), formats.get(extension, extension.upper()))
    assert Preparer(Config()).prepare(sample(txt=b"a", **{extension: data}), (0,)).image.shape == (3, 32, 32)


def test_the_content_and_not_the_extension_tells_the_format() -> None:
    mislabelled = sample(jpg=encode(picture(), "PNG"), txt=b"a")
    assert Preparer(Config()).prepare(mislabelled, (0,)).image.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"txt": b"a"}, "no_image"),
        ({"jpg": b"", "txt": b"a"}, "empty_image"),
        ({"jpg": jpeg()[:2000], "txt": b"a"}, "undecodable_image"),
        ({"jpg": jpeg(1100, 1000), "txt": b"a"}, "too_many_pixels"),
        ({"jpg": jpeg()}, "no_caption"),
        ({"jpg": jpeg(), "txt": b" "}, "empty_caption"),
    ],
)
def test_what_cannot_be_used_says_why(fields: dict[str, bytes], reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        Preparer(Config()).prepare(sample(**fields), (0,))
    assert caught.value.reason == reason


def test_fast_decoding_takes_the_same_crop_and_draws() -> None:
    large = sample(jpg=encode(photo(500, 400, 3)), txt=b"a")
    for key in range(5):
        exact = Preparer(Config()).prepare(large, (key,))
        fast = Preparer(Config(image_decode="fast")).prepare(large, (key,))
        assert not torch.equal(fast.image, exact.image)
        assert (fast.image.float() - exact.image.float()).abs().mean() <= 2
        assert all(torch.equal(fast.draws[name], exact.draws[name]) for name in exact.draws)


@pytest.mark.parametrize(
    "fields", [{"jpg": jpeg()}, {"jpg": encode(picture().convert("CMYK"))}, {"png": encode(picture(200, 200), "PNG")}]
)
def test_fast_decoding_changes_nothing_where_it_saves_nothing(fields: dict[str, bytes]) -> None:
    size = (64, 64)
    for key in range(5):
        exact = Preparer(Config(image_size=size)).prepare(sample(txt=b"a", **fields), (key,))
        assert equal(
            Preparer(Config(image_size=size, image_decode="fast")).prepare(sample(txt=b"a", **fields), (key,)), exact
        )


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_reasons_do_not_depend_on_the_way_of_decoding(decode: str) -> None:
    whole = jpeg(300, 400)
    for data, reason in (
        (whole[: len(whole) // 2], "undecodable_image"),
        (b"", "empty_image"),
        (b"\xff\xd8\xff", "undecodable_image"),
        (jpeg(1001, 1000), "too_many_pixels"),
    ):
        with pytest.raises(SampleError) as caught:
            Preparer(Config(image_decode=decode)).prepare(sample(jpg=data, txt=b"a"), (0,))
        assert caught.value.reason == reason
