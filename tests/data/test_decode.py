from __future__ import annotations

import io
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import decode_rgb, resize_crop
from data.samples import SampleError
from tests.data.pictures import decoded_by_pillow, encode, jpeg, picture

NO_LIMIT = 10**9


def reason_of(data: bytes, max_pixels: int = NO_LIMIT) -> str:
    with pytest.raises(SampleError) as caught:
        decode_rgb(data, max_pixels)
    return caught.value.reason


def files() -> dict[str, bytes]:
    rgb = picture()
    alpha = rgb.copy()
    alpha.putalpha(picture(seed=3).convert("L"))
    palette = rgb.quantize(64)
    frames = [picture(seed=i).quantize(32) for i in range(3)]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "jpeg 4:2:0": jpeg(subsampling=2),
        "jpeg 4:2:2": jpeg(subsampling=1),
        "jpeg 4:4:4": jpeg(subsampling=0),
        "jpeg progressive": jpeg(progressive=True),
        "jpeg stored as rgb": jpeg(keep_rgb=True),
        "jpeg with restart markers": jpeg(restart_marker_rows=1),
        "jpeg rotated by exif": jpeg(exif=rotated),
        "jpeg odd size": jpeg(1, 7),
        "jpeg grey": encode(rgb.convert("L")),
        "jpeg cmyk": encode(rgb.convert("CMYK")),
        "png": encode(rgb, "PNG"),
        "png alpha": encode(alpha, "PNG"),
        "png grey": encode(rgb.convert("L"), "PNG"),
        "png grey alpha": encode(alpha.convert("LA"), "PNG"),
        "png 1 bit": encode(rgb.convert("1"), "PNG"),
        "png 16 bit": encode(Image.fromarray((np.arange(6000, dtype=np.uint16) * 11).reshape(60, 100)), "PNG"),
        "png palette": encode(palette, "PNG"),
        "png palette, transparent": encode(palette, "PNG", transparency=bytes(range(64))),
        "webp": encode(rgb, "WEBP"),
        "webp alpha": encode(alpha, "WEBP"),
        "gif, first frame": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": encode(rgb, "BMP"),
        "tiff": encode(rgb, "TIFF"),
    }


FILES = files()


@pytest.mark.parametrize("kind", FILES)
def test_pixels_equal_those_of_pillow(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = decoded_by_pillow(FILES[kind])
    pixels = decode_rgb(FILES[kind], NO_LIMIT)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_exif_rotation_is_ignored_as_openclip_does() -> None:
    assert decode_rgb(FILES["jpeg rotated by exif"], NO_LIMIT).shape == (97, 131, 3)


@pytest.mark.parametrize(
    "kind", ["jpeg 4:2:0", "jpeg 4:4:4", "jpeg progressive", "jpeg cmyk", "jpeg grey", "png", "webp"]
)
def test_a_cut_picture_is_undecodable_wherever_it_is_cut(kind: str) -> None:
    data = FILES[kind]
    for cut in [*range(1, len(data) - 16, len(data) // 40), len(data) * 3 // 4]:
        assert reason_of(data[:cut]) == "undecodable_image", f"cut at {cut} of {len(data)}"


@pytest.mark.parametrize("kind", ["jpeg 4:2:0", "jpeg 4:4:4", "jpeg cmyk", "jpeg grey", "jpeg with restart markers"])
@pytest.mark.parametrize("tail", [b"\xff\xd9", bytes(5000), bytes(50_000) + b"\xff\xd9"])
def test_a_jpeg_that_pillow_would_fill_with_grey_is_undecodable(kind: str, tail: bytes) -> None:
    data = FILES[kind]
    for cut in range(len(data) // 3, len(data) - 100, len(data) // 10):
        assert reason_of(data[:cut] + tail) == "undecodable_image"


def test_a_jpeg_that_lacks_only_its_end_marker_is_refused_as_pillow_refuses_it() -> None:
    with pytest.raises(OSError, match="truncated"):
        decoded_by_pillow(jpeg()[:-2])
    assert reason_of(jpeg()[:-2]) == "undecodable_image"


def test_surplus_bytes_around_the_end_of_a_whole_jpeg_do_no_harm() -> None:
    data = jpeg()
    for whole in (data[:-2] + b"\0\0\x12\x34" + data[-2:], data + b"trailing bytes", data + data):
        np.testing.assert_array_equal(decode_rgb(whole, NO_LIMIT), decoded_by_pillow(data))


def test_no_bytes_and_no_picture_have_their_own_reasons() -> None:
    assert reason_of(b"") == "empty_image"
    for junk in (
        b"x",
        b"<html>404</html>",
        bytes(1000),
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0" + bytes(100),
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
    ):
        assert reason_of(junk) == "undecodable_image"


@pytest.mark.parametrize("kind", ["jpeg 4:2:0", "jpeg cmyk", "png", "webp", "gif, first frame"])
def test_the_pixel_cap_holds_for_every_format(kind: str) -> None:
    assert reason_of(FILES[kind], 97 * 131 - 1) == "too_many_pixels"
    assert decode_rgb(FILES[kind], 97 * 131).shape == (97, 131, 3)


def test_the_pixel_cap_is_read_from_the_header_alone() -> None:
    header_only = encode(Image.new("1", (3000, 3000)), "PNG")[:64]
    assert reason_of(header_only, 1_000_000) == "too_many_pixels"
    assert reason_of(jpeg(400, 500)[:700], 1000) == "too_many_pixels"


def test_pillows_warnings_stay_inside_even_with_threads() -> None:
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            for _ in range(20):
                decode_rgb(FILES["png palette, transparent"], NO_LIMIT)
        except BaseException as error:
            failures.append(error)

    filters = list(warnings.filters)
    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert warnings.filters == filters


def pillow_resize(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int], filter: str) -> np.ndarray:
    top, left, height, width = box
    kind = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[filter]
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size[1], size[0]), kind)).transpose(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 300, 400), (224, 224)),
        ((13, 57, 251, 290), (224, 224)),
        ((100, 100, 40, 60), (224, 160)),  # enlarged
        ((0, 5, 299, 333), (32, 32)),
        ((7, 9, 64, 48), (64, 48)),  # as it is
        ((299, 399, 1, 1), (16, 16)),
    ],
)
def test_resized_crops_are_within_one_grey_level_of_pillow(
    box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str
) -> None:
    image = picture(300, 400)
    ours = resize_crop(np.array(image), box, size, interpolation)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, *size)
    difference = np.abs(ours.numpy().astype(int) - pillow_resize(image, box, size, interpolation).astype(int))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 2e-5
    assert (difference > 0).mean() < 0.01


@pytest.mark.parity
def test_decode_and_resize_are_within_one_grey_level_of_openclips_train_transform() -> None:
    open_clip = pytest.importorskip("open_clip")
    from torchvision.transforms import RandomResizedCrop

    transform = open_clip.image_transform(64, is_train=True, mean=(0.0,) * 3, std=(1.0,) * 3)
    for seed in range(8):
        data = jpeg(150 + 10 * seed, 170, seed)
        crop = next(step for step in transform.transforms if isinstance(step, RandomResizedCrop))
        torch.manual_seed(seed)
        with Image.open(io.BytesIO(data)) as image:
            box = crop.get_params(image, crop.scale, crop.ratio)
            torch.manual_seed(seed)
            theirs = (transform(image) * 255).round()
        ours = resize_crop(decode_rgb(data, NO_LIMIT), tuple(box), (64, 64), "bicubic")
        assert (ours.float() - theirs).abs().max() <= 1
