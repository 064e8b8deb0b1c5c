"""The demo's data: drawn scenes of coloured shapes with captions, as WebDataset shards.

Every scene is a function of (seed, split, index). One fifth of the colour-shape combinations is never
drawn for training; the zero-shot set shows only those, and asks for the right one among all
combinations, so that neither colours alone nor shapes alone can answer.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image, ImageDraw

from data.randomness import KeyedRandom

COLOURS = {
    "red": (215, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 215, 30),
    "green": (35, 150, 60),
    "cyan": (50, 195, 215),
    "blue": (35, 65, 200),
    "purple": (120, 40, 160),
    "pink": (245, 120, 180),
    "brown": (125, 75, 35),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "arrow", "crescent", "bar")
# Two of ten diagonals: each colour lacks two shapes in training, each shape lacks two colours.
_HELD_OUT_DIAGONALS = (0, 3)

_WORDS = {1: ("a", "one"), 2: ("two",), 3: ("three",), 4: ("four",)}
_SIZES = {"small": (0.11, 0.14), "": (0.15, 0.20), "large": (0.22, 0.28)}
# Left, top, right, bottom of the part of the picture that a position names.
_REGIONS = {
    "": (0.0, 0.0, 1.0, 1.0),
    "on the left": (0.0, 0.0, 0.5, 1.0),
    "on the right": (0.5, 0.0, 1.0, 1.0),
    "at the top": (0.0, 0.0, 1.0, 0.5),
    "at the bottom": (0.0, 0.5, 1.0, 1.0),
    "in the middle": (0.25, 0.25, 0.75, 0.75),
}
_FRAMES = ("{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}", "{} on a plain background")
TEMPLATES = ("{c}", "a {c}", "a picture of a {c}", "an image of a {c}", "a drawing of a {c}")
_SUPERSAMPLING = 3
_CIRCLE = tuple((math.cos(2 * math.pi * k / 48), math.sin(2 * math.pi * k / 48)) for k in range(48))
_RING_HOLE = tuple((0.5 * u, 0.5 * v) for u, v in _CIRCLE)


@dataclass(frozen=True)
class DemoSize:
    """How much is drawn. The defaults suit two CPU cores and a few minutes."""

    train: int = 6000
    val: int = 500
    evaluation: int = 1000
    shard: int = 1000
    pixels: int = 80


@dataclass(frozen=True)
class Group:
    """Equal shapes that a caption names together: `count` of them inside the named region."""

    colour: str
    shape: str
    count: int = 1
    size: str = ""
    position: str = ""

    @property
    def combination(self) -> str:
        """The class name, e.g. 'red circle'."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One picture: its groups of shapes, left to right, and the caption that describes them."""

    groups: tuple[Group, ...]
    caption: str


def combinations() -> list[str]:
    """All class names, colour by colour: 'red circle', 'red square', ..."""
    return [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def held_out() -> frozenset[str]:
    """The combinations that training never shows."""
    names = enumerate(COLOURS), list(enumerate(SHAPES))
    return frozenset(
        f"{colour} {shape}" for i, colour in names[0] for j, shape in names[1] if (i - j) % 10 in _HELD_OUT_DIAGONALS
    )


def training_scene(random: KeyedRandom) -> Scene:
    """A scene of trained combinations: three in four times one group, else two different shapes side by side."""
    seen = [name for name in combinations() if name not in held_out()]
    first = _draw_group(random, seen)
    if random.uniform() < 0.75:
        return Scene((first,), _frame(random, _phrase(random, first)))
    left = Group(first.colour, first.shape, size=first.size)
    colour, shape = _pick(random, [name for name in seen if name != left.combination]).split()
    right = Group(colour, shape, size=first.size)
    joined = f"{_phrase(random, left)} {_pick(random, ('left of', 'next to', 'and'))} {_phrase(random, right)}"
    return Scene((left, right), _frame(random, joined))


def held_out_scene(random: KeyedRandom, combination: str) -> Scene:
    """One shape of a combination that training never shows, anywhere in the picture."""
    size, position = _pick(random, tuple(_SIZES)), _pick(random, tuple(_REGIONS))
    colour, shape = combination.split()
    group = Group(colour, shape, 1, size, position)
    return Scene((group,), _frame(random, _phrase(random, group)))


def draw(scene: Scene, random: KeyedRandom, pixels: int) -> Image.Image:
    """The picture of a scene, RGB `pixels` x `pixels`: anti-aliased, with jitter in colour, place, size and angle."""
    side = pixels * _SUPERSAMPLING
    shade = 195 + 60 * random.uniform()
    background = tuple(int(min(255, shade + random.uniform(-14, 14))) for _ in range(3))
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    for index, group in enumerate(scene.groups):
        cells = _cells(random, scene, index)
        colour = tuple(int(min(255, max(0, c + random.uniform(-22, 22)))) for c in COLOURS[group.colour])
        for cell in cells:
            place = _place(random, group, cell)
            canvas.polygon(place.corners(_unit_shape(group.shape), side), fill=colour)
            if group.shape == "ring":
                canvas.polygon(place.corners(_RING_HOLE, side), fill=background)
    return image.reduce(_SUPERSAMPLING)


def draw_once(root: Path, seed: int = 0, size: DemoSize | None = None) -> bool:
    """`write_demo_data` unless `root` is there; False if it was. A kill on the way leaves no `root`."""
    if root.exists():
        return False
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as folder:
        write_demo_data(Path(folder) / root.name, seed, size)
        (Path(folder) / root.name).rename(root)
    return True


def write_demo_data(root: Path, seed: int = 0, size: DemoSize | None = None) -> None:
    """Writes `root`/train and /val (pairs: jpg, txt, json) and `root`/eval (CLIP_benchmark's layout: jpg, cls).

    The same seed and size give the same files, byte for byte, under the same Pillow.
    """
    size = size or DemoSize()
    for split, count in (("train", size.train), ("val", size.val)):
        _write_shards(root / split, _pairs(seed, split, count, size.pixels), size.shard)
    _write_zeroshot(root / "eval", seed, size)


def _write_zeroshot(root: Path, seed: int, size: DemoSize) -> None:
    num_shards = len(_write_shards(root / "test", _labelled(seed, size), size.shard, pattern="%d.tar", sizes=False))
    (root / "test" / "nshards.txt").write_text(f"{num_shards}\n")
    (root / "classnames.txt").write_text("\n".join(combinations()) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def _pairs(seed: int, split: str, count: int, pixels: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        random = KeyedRandom(seed, "demo", split, index)
        scene = training_scene(random)
        facts = {"caption": scene.caption, "groups": [asdict(group) for group in scene.groups]}
        yield {"jpg": _jpeg(draw(scene, random, pixels)), "txt": scene.caption, "json": json.dumps(facts)}


def _labelled(seed: int, size: DemoSize) -> Iterator[dict[str, Any]]:
    classes = combinations()
    shown = sorted(held_out())
    for index in range(size.evaluation):
        random = KeyedRandom(seed, "demo", "evaluation", index)
        combination = shown[index % len(shown)]
        image = draw(held_out_scene(random, combination), random, size.pixels)
        yield {"jpg": _jpeg(image), "cls": str(classes.index(combination))}


def _write_shards(
    folder: Path, samples: Iterator[dict[str, Any]], shard_size: int, pattern: str = "%05d.tar", sizes: bool = True
) -> dict[str, int]:
    """Samples into tars of `shard_size`; returns (and with `sizes` writes to sizes.json) the count of each."""
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    with webdataset.ShardWriter(str(folder / pattern), maxcount=shard_size, verbose=0, mtime=0.0) as writer:
        for index, sample in enumerate(samples):
            writer.write({"__key__": f"{index:08d}", **sample})
            name = pattern % (index // shard_size)
            counts[name] = counts.get(name, 0) + 1
    if sizes:
        (folder / "sizes.json").write_text(json.dumps(counts, indent=1) + "\n")
    return counts


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _pick(random: KeyedRandom, options: Any) -> Any:
    return options[int(random.uniform() * len(options))]


def _draw_group(random: KeyedRandom, names: list[str]) -> Group:
    colour, shape = _pick(random, names).split()
    count = _pick(random, (1, 1, 1, 2, 3, 4))
    return Group(colour, shape, count, _pick(random, tuple(_SIZES)), _pick(random, tuple(_REGIONS)))


def _phrase(random: KeyedRandom, group: Group) -> str:
    plural = "" if group.count == 1 else "es" if group.shape == "cross" else "s"
    words = [_pick(random, _WORDS[group.count]), group.size, group.combination + plural, group.position]
    text = " ".join(word for word in words if word)
    return "an " + text[2:] if text.startswith("a orange") else text


def _frame(random: KeyedRandom, phrase: str) -> str:
    return _pick(random, _FRAMES).format(phrase)


def _cells(random: KeyedRandom, scene: Scene, index: int) -> list[tuple[float, float, float, float]]:
    """A box for each shape of a group: its region cut into `count` parts along the longer side."""
    group = scene.groups[index]
    if len(scene.groups) > 1:
        return [(index / 2, 0.0, (index + 1) / 2, 1.0)]
    left, top, right, bottom = _REGIONS[group.position]
    cuts = [k / group.count for k in range(group.count + 1)]
    wide = right - left > bottom - top or (right - left == bottom - top and random.uniform() < 0.5)
    if wide:
        xs = [left + (right - left) * cut for cut in cuts]
        return [(xs[k], top, xs[k + 1], bottom) for k in range(group.count)]
    ys = [top + (bottom - top) * cut for cut in cuts]
    return [(left, ys[k], right, ys[k + 1]) for k in range(group.count)]


@dataclass(frozen=True)
class _Place:
    """Where one shape stands, in units of the picture's side; the angle in radians."""

    x: float
    y: float
    radius: float
    angle: float

    def corners(self, outline: Iterable[tuple[float, float]], side: int) -> list[tuple[float, float]]:
        """An outline inside the unit circle, moved here, in pixels."""
        cos, sin = self.radius * math.cos(self.angle), self.radius * math.sin(self.angle)
        return [((self.x + u * cos - v * sin) * side, (self.y + u * sin + v * cos) * side) for u, v in outline]


def _place(random: KeyedRandom, group: Group, cell: tuple[float, float, float, float]) -> _Place:
    left, top, right, bottom = cell
    radius = min(random.uniform(*_SIZES[group.size]), (right - left) * 0.48, (bottom - top) * 0.48)
    x, y = random.uniform(left + radius, right - radius), random.uniform(top + radius, bottom - radius)
    return _Place(x, y, radius, math.radians(random.uniform(-15, 15)))


def _unit_shape(shape: str) -> list[tuple[float, float]]:
    """Corners inside the unit circle, y downwards."""
    if shape in ("circle", "ring"):
        return list(_CIRCLE)
    if shape == "crescent":
        outer = [(math.cos(a), math.sin(a)) for a in _angles(50, 310, 36)]
        inner = [(0.45 + 0.79 * math.cos(a), 0.79 * math.sin(a)) for a in _angles(285, 75, 30)]
        return outer + inner
    if shape == "star":
        return [_polar(1.0 if k % 2 == 0 else 0.42, -90 + 36 * k) for k in range(10)]
    if shape == "heart":
        return [_heart(a) for a in _angles(0, 360, 40)]
    return list(_POLYGONS[shape])


_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)),
    "bar": ((-1.0, -0.28), (1.0, -0.28), (1.0, 0.28), (-1.0, 0.28)),
    "arrow": ((-1.0, -0.22), (0.1, -0.22), (0.1, -0.75), (1.0, 0.0), (0.1, 0.75), (0.1, 0.22), (-1.0, 0.22)),
    "cross": tuple(
        (0.95 * u, 0.95 * v)
        for u, v in (
            *((-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3)),
            *((0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3)),
        )
    ),
}


def _angles(start: float, stop: float, count: int) -> list[float]:
    return [math.radians(start + (stop - start) * k / (count - 1)) for k in range(count)]


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _heart(a: float) -> tuple[float, float]:
    """The curve 16 sin^3 a, 13 cos a - 5 cos 2a - 2 cos 3a - cos 4a, scaled into the unit circle."""
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return math.sin(a) ** 3 * 0.95, -(y + 2) / 16 * 0.95
