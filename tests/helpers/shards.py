"""Small WebDataset shards of drawn pictures, whole or broken on purpose. Knows no loader."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import webdataset
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
SHAPES = ("circle", "square", "triangle")

BREAKAGES = ("truncated_image", "not_an_image", "empty_image", "no_image", "no_caption", "empty_caption")


def caption_of(index: int) -> str:
    """The caption of the sample with this number, e.g. "a red circle 0"; no two numbers share one."""
    return f"a {COLOURS[index % len(COLOURS)]} {SHAPES[index // len(COLOURS) % len(SHAPES)]} {index}"


def draw_image(index: int, image_size: int = 32) -> Image.Image:
    """The picture of `caption_of(index)`: an RGB image, `image_size` pixels a side, the same on every machine."""
    image = Image.new("RGB", (image_size, image_size), (index * 37 % 60, index * 53 % 60, index * 71 % 60))
    canvas = ImageDraw.Draw(image)
    colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index // len(COLOURS) % len(SHAPES)]
    low, high = image_size // 4, image_size - image_size // 4
    if shape == "circle":
        canvas.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        canvas.rectangle((low, low, high, high), fill=colour)
    else:
        canvas.polygon([(image_size // 2, low), (low, high), (high, high)], fill=colour)
    return image


def encode_image(image: Image.Image, extension: str = "jpg") -> bytes:
    """The file content of `image` in the format of `extension` (jpg, png, webp)."""
    buffer = io.BytesIO()
    image.save(buffer, format={"jpg": "JPEG"}.get(extension, extension.upper()), quality=90)
    return buffer.getvalue()


def make_sample(
    index: int, *, image_size: int = 32, caption: str | None = None, broken: str | None = None, extension: str = "jpg"
) -> dict[str, bytes]:
    """Extension -> content of one sample with image, `txt` and `json`; `broken` is one of `BREAKAGES`."""
    assert broken is None or broken in BREAKAGES, broken
    text = caption_of(index) if caption is None else caption
    image = encode_image(draw_image(index, image_size), extension)
    sample = {extension: image, "txt": text.encode(), "json": json.dumps({"index": index, "alt": text}).encode()}
    if broken == "truncated_image":
        sample[extension] = image[: len(image) // 2]
    elif broken == "not_an_image":
        sample[extension] = b"these are no pixels"
    elif broken == "empty_image":
        sample[extension] = b""
    elif broken == "no_image":
        del sample[extension]
    elif broken == "no_caption":
        del sample["txt"]
    elif broken == "empty_caption":
        sample["txt"] = b"  \n"
    return sample


def write_shards(
    folder: Path,
    counts: Sequence[int],
    *,
    image_size: int = 32,
    broken: Mapping[int, str] | None = None,
    captions: Callable[[int], str] | None = None,
    extension: str = "jpg",
    sizes_json: bool = False,
    name: str = "shard-{:05d}.tar",
) -> list[Path]:
    """Writes one shard for each of `counts`; samples are numbered through all shards, key `%08d`.

    `broken` maps a sample's number to one of `BREAKAGES`. `sizes_json` also writes the counts beside the
    shards, as img2dataset's users know it. Returns the shards' paths; their bytes depend on the arguments alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, index = [], 0
    for number, count in enumerate(counts):
        path = folder / name.format(number)
        with webdataset.TarWriter(str(path), encoder=False, mtime=0.0) as writer:
            for _ in range(count):
                caption = captions(index) if captions else None
                fields = make_sample(
                    index,
                    image_size=image_size,
                    caption=caption,
                    broken=(broken or {}).get(index),
                    extension=extension,
                )
                writer.write({"__key__": f"{index:08d}", **fields})
                index += 1
        paths.append(path)
    if sizes_json:
        sizes = {path.name: count for path, count in zip(paths, counts, strict=True)}
        (folder / "sizes.json").write_text(json.dumps(sizes))
    return paths


def cut_tar(path: Path, keep: float = 0.5) -> None:
    """Cuts a shard to a share of its bytes, in the middle of a member as a broken upload would."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) | 1])
