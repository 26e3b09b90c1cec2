"""Rendered scenes: coloured shapes on textured ground, a sign to read, padding bars, and questions about them.

Everything follows from a random generator, so that a seed is a data set. Nothing here needs torch; pictures need Pillow.
Things have dark rims, as in drawings, and stand on the grid of patches give or take a pixel: a small vision tower then learns to
tell their shapes in minutes, where free places and bare colours took hours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 336  # pixels of a picture
CELL = 14  # pixels of a patch of the built-in model
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "moon")
COLOURS = {
    "red": (214, 39, 40), "green": (30, 150, 60), "blue": (40, 80, 220), "yellow": (250, 220, 40),
    "purple": (140, 50, 170), "orange": (255, 127, 14), "white": (250, 250, 250), "pink": (255, 150, 190),
}  # fmt: skip
WORDS = (
    "bank", "bus", "cafe", "exit", "food", "gate", "hotel", "lift", "mail", "open", "park", "sale", "stop", "taxi", "way", "zoo",
)  # fmt: skip
TYPES = ("colour", "count", "position", "comparison", "reading", "existence")
RADII = (13, 20, 27)  # of things, in pixels, give or take 7 %: two, three and four patches wide
RIM = 2  # pixels of the dark line around a thing
INK = (20, 20, 30)
MOST = 4  # of one kind that are counted
BAR = (122, 116, 104)  # what a letterboxed picture is filled up with: the mean colour of CLIP's normalisation


@dataclass(frozen=True)
class Thing:
    """One coloured shape: centre and radius in pixels, turned by ``angle`` degrees."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A light plate with a number or a word; box in pixels: left, top, right, bottom."""

    text: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Question:
    """One of ``TYPES``, as a person would ask it, and the words of the answer."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """What is in a picture of ``side`` pixels. ``bars``: pixels of padding at the left, top, right and bottom."""

    side: int
    things: tuple[Thing, ...]
    sign: Sign | None
    bars: tuple[int, int, int, int]
    texture: int = field(repr=False)

    def render(self) -> Image:
        """An RGB picture of ``side`` x ``side``."""
        from PIL import Image, ImageDraw, ImageFilter

        picture = Image.fromarray(_ground(self.side, self.texture))
        for thing in self.things:
            mask = _mask(thing)
            picture.paste(INK, _corner(thing, mask), mask)
            picture.paste(COLOURS[thing.colour], _corner(thing, mask), mask.filter(ImageFilter.MinFilter(2 * RIM + 1)))
        draw = ImageDraw.Draw(picture)
        if self.sign is not None:
            left, top, right, bottom = self.sign.box
            draw.rectangle((left, top, right - 1, bottom - 1), fill=(232, 230, 220), outline=(70, 70, 70))
            draw.text(((left + right) / 2, (top + bottom) / 2), self.sign.text, fill=INK, font=_font(), anchor="mm")
        left, top, right, bottom = self.bars
        for box in ((0, 0, left, self.side), (self.side - right, 0, self.side, self.side)):
            draw.rectangle((box[0], box[1], box[2] - 1, box[3]), fill=BAR) if box[2] > box[0] else None
        for box in ((0, 0, self.side, top), (0, self.side - bottom, self.side, self.side)):
            draw.rectangle((box[0], box[1], box[2], box[3] - 1), fill=BAR) if box[3] > box[1] else None
        return picture

    def cells(self, what: str) -> np.ndarray:
        """Boolean ``(side / CELL, side / CELL)``: patches that show ``things`` or the ``sign``, or only a ``bar``."""
        n = self.side // CELL
        grid = np.zeros((n, n), dtype=bool)
        if what == "bar":
            left, top, right, bottom = (b // CELL for b in self.bars)
            grid[:top], grid[n - bottom :], grid[:, :left], grid[:, n - right :] = True, True, True, True
        elif what == "sign" and self.sign is not None:
            left, top, right, bottom = self.sign.box
            grid[top // CELL : -(-bottom // CELL), left // CELL : -(-right // CELL)] = True
        elif what == "things":
            for thing in self.things:
                grid |= covered(thing, n)
        return grid


def covered(thing: Thing, n: int) -> np.ndarray:
    """Boolean ``(n, n)``: patches of CELL pixels of which the thing covers a seventh at least."""
    mask = _mask(thing)
    canvas = np.zeros((n * CELL, n * CELL), dtype=np.float32)
    left, top = _corner(thing, mask)
    canvas[top : top + mask.height, left : left + mask.width] = np.asarray(mask)[: n * CELL - top, : n * CELL - left]
    return canvas.reshape(n, CELL, n, CELL).mean((1, 3)) > 255 / 7


def make_scene(rng: np.random.Generator, side: int = SIDE, things: tuple[int, int] | None = None, sign: float = 0.75) -> Scene:
    """A random scene. ``things``: least and most shapes; by default as many as fit comfortably; ``sign``: chance of a sign."""
    least, most = things or (2, 8 if side >= SIDE else 5 if side >= SIDE // 2 else 3)
    bars = _bars(rng, side)
    boxes: list[tuple[float, float, float, float]] = []
    plate = None
    if rng.random() < sign:
        text = str(rng.integers(0, 100)) if rng.random() < 0.5 else str(rng.choice(WORDS))
        width, height = _text_size(text)
        placed = _place(rng, side, bars, boxes, width / 2, height / 2)
        if placed is not None:
            x, y = (round(v) for v in placed)
            plate = Sign(text, (x - width // 2, y - height // 2, x - width // 2 + width, y - height // 2 + height))
    # a few kinds, so that counting has something to count
    number = most if most < 4 else int(rng.integers(2, most + 1))  # where there are few things, they are different ones
    kinds = [(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))) for _ in range(number)]
    found: list[Thing] = []
    for _ in range(int(rng.integers(least, most + 1))):
        shape, colour = kinds[int(rng.integers(len(kinds)))]
        if sum(t.shape == shape for t in found) >= MOST or sum(t.colour == colour for t in found) >= MOST:
            continue
        radius = float(rng.choice(RADII) * rng.uniform(0.93, 1.07))
        at = _place(rng, side, bars, boxes, radius, radius, snap=True)
        if at is not None:
            found.append(Thing(shape, colour, *at, radius, float(rng.uniform(-3, 3))))
    return Scene(side, tuple(found), plate, bars, int(rng.integers(1 << 31)))


def ask(scene: Scene, rng: np.random.Generator, type: str) -> Question | None:
    """A random question of one of ``TYPES`` that the scene answers without doubt, or None where there is none."""
    return {
        "colour": _ask_colour, "count": _ask_count, "position": _ask_position, "comparison": _ask_comparison,
        "reading": _ask_reading, "existence": _ask_existence,
    }[type](scene, rng)  # fmt: skip


def examples(seed: int, type: str | None = None) -> Iterator[tuple[Scene, Question]]:
    """Endless scenes with one question each: of one type, or of all types in turn."""
    rng = np.random.default_rng(seed)
    turn = 0
    while True:
        wanted = type or TYPES[turn % len(TYPES)]
        scene = make_scene(rng, sign=1.0 if wanted == "reading" else 0.75)
        question = ask(scene, rng, wanted)
        if question is not None:
            turn += 1
            yield scene, question


def _ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _pick(rng, [t for t in scene.things if _single(scene, t)])
    return thing and Question("colour", f"what colour is the {thing.shape} ?", thing.colour)


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    shapes, colours = [t.shape for t in scene.things], [t.colour for t in scene.things]
    kind, known = (SHAPES, shapes) if rng.random() < 0.5 else (tuple(COLOURS), colours)
    # what is there half of the time and more often the more there are; something else, rarely there, otherwise
    name = str(rng.choice(known)) if known and rng.random() < 0.8 else str(rng.choice(kind))
    asked = plural(name) if kind is SHAPES else f"{name} shapes"
    return Question("count", f"how many {asked} are there ?", str(known.count(name)))


def _ask_position(scene: Scene, rng: np.random.Generator) -> Question | None:
    a, b = _pair(scene, rng)
    if a is None or b is None:
        return None
    far = [(abs(a.x - b.x), "left or right of", "left" if a.x < b.x else "right"),
           (abs(a.y - b.y), "above or below", "above" if a.y < b.y else "below")]  # fmt: skip
    clear = _pick(rng, [f for f in far if f[0] > 1.5 * CELL])
    if clear is None:
        return None
    _, words, answer = clear
    return Question("position", f"is the {a.shape} {words} the {b.shape} ?", answer)


def _ask_comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    a, b = _pair(scene, rng)
    if a is None or b is None or max(a.radius, b.radius) < 1.25 * min(a.radius, b.radius):
        return None
    word = "larger" if rng.random() < 0.5 else "smaller"
    answer = max(a, b, key=lambda t: t.radius if word == "larger" else -t.radius)
    return Question("comparison", f"which is {word} , the {a.shape} or the {b.shape} ?", answer.shape)


def _ask_reading(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.sign is None:
        return None
    kind = "number" if scene.sign.text.isdigit() else "word"
    answer = " ".join(scene.sign.text) if kind == "number" else scene.sign.text
    return Question("reading", f"what {kind} is on the sign ?", answer)


def _ask_existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Half of the answers are no; most of those ask for a colour and a shape that are both there, but apart."""
    present = {(t.colour, t.shape) for t in scene.things}
    if rng.random() < 0.5:
        colour, shape = _pick(rng, sorted(present)) or (None, None)
        return colour and Question("existence", f"is there {article(colour)} {colour} {shape} ?", "yes")
    apart = sorted({(a.colour, b.shape) for a in scene.things for b in scene.things} - present)
    chosen = _pick(rng, apart) if rng.random() < 0.7 else None
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
    colour, shape = chosen or _pick(rng, absent)
    return Question("existence", f"is there {article(colour)} {colour} {shape} ?", "no")


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _single(scene: Scene, thing: Thing) -> bool:
    return sum(t.shape == thing.shape for t in scene.things) == 1


def _pair(scene: Scene, rng: np.random.Generator) -> tuple[Thing | None, Thing | None]:
    single = [t for t in scene.things if _single(scene, t)]
    if len(single) < 2:
        return None, None
    first, second = rng.choice(len(single), 2, replace=False)
    return single[first], single[second]


def _pick(rng: np.random.Generator, items: list):
    return items[int(rng.integers(len(items)))] if items else None


def _bars(rng: np.random.Generator, side: int) -> tuple[int, int, int, int]:
    """A letterbox in two of three pictures: equal bars at two opposite sides, up to a quarter of the side each."""
    bar = int(rng.integers(side // 24, side // 4))
    kind = int(rng.integers(3))
    return [(0, 0, 0, 0), (bar, 0, bar, 0), (0, bar, 0, bar)][kind]


def _place(
    rng, side: int, bars: tuple, boxes: list, half_width: float, half_height: float, snap: bool = False
) -> tuple[float, float] | None:
    """A free centre for a box of these halves, two pixels from all others; None after some tries.

    ``snap``: on the grid of patches, so that the box covers whole ones, give or take a pixel.
    """
    low = (bars[0] + half_width + 2, bars[1] + half_height + 2)
    high = (side - bars[2] - half_width - 2, side - bars[3] - half_height - 2)
    if low[0] >= high[0] or low[1] >= high[1]:
        return None
    for _ in range(30):
        x, y = float(rng.uniform(low[0], high[0])), float(rng.uniform(low[1], high[1]))
        if snap:
            x, y = (_snapped(v, half_width) + float(rng.uniform(-1, 1)) for v in (x, y))
            if not (low[0] - 2 <= x <= high[0] + 2 and low[1] - 2 <= y <= high[1] + 2):
                continue
        if all(abs(x - bx) > half_width + bw + 2 or abs(y - by) > half_height + bh + 2 for bx, by, bw, bh in boxes):
            boxes.append((x, y, half_width, half_height))
            return x, y
    return None


def _snapped(centre: float, half: float) -> float:
    """The nearest centre at which a box of this half covers whole patches: a corner of patches or the middle of one."""
    middle = 0 if round(2 * half / CELL) % 2 == 0 else CELL / 2
    return round((centre - middle) / CELL) * CELL + middle


def _ground(side: int, seed: int) -> np.ndarray:
    """uint8 ``(side, side, 3)``: muted colour fields, stripes and grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(70, 180, (7, 7, 1)) + rng.uniform(-25, 25, (7, 7, 3))
    at = np.linspace(0, 5.999, side, dtype=np.float32)
    low, part = at.astype(int), (at % 1)[:, None]
    coarse = coarse.astype(np.float32)
    rows = coarse[low] * (1 - part[..., None]) + coarse[low + 1] * part[..., None]
    field_ = rows[:, low] * (1 - part[None]) + rows[:, low + 1] * part[None]
    angle, turn = rng.uniform(0, math.pi), 2 * math.pi / rng.uniform(8, 40)
    x = np.arange(side, dtype=np.float32)
    along, down = x * np.float32(math.cos(angle) * turn), x * np.float32(math.sin(angle) * turn)
    wave = np.sin(along) * np.cos(down)[:, None] + np.cos(along) * np.sin(down)[:, None]  # the sine of the sum
    grain = rng.standard_normal((side, side), dtype=np.float32)
    ground = field_ + (wave * np.float32(rng.uniform(0, 18)) + grain * np.float32(rng.uniform(2, 10)))[..., None]
    return ground.clip(0, 255).astype(np.uint8)


def _corner(thing: Thing, mask: Image) -> tuple[int, int]:
    """Left and top pixel of a thing's square."""
    return max(0, round(thing.x - mask.width / 2)), max(0, round(thing.y - mask.height / 2))


def _mask(thing: Thing) -> Image:
    """How much of each pixel of its square the thing covers, 8 bit."""
    from PIL import Image, ImageDraw

    scale, size = 4, math.ceil(thing.radius) * 2 + 2
    mask = Image.new("L", (size * scale, size * scale))
    draw, centre, radius = ImageDraw.Draw(mask), size * scale / 2, thing.radius * scale

    def disc(r: float, fill: int, dx: float = 0.0) -> None:
        draw.ellipse((centre - r + dx, centre - r, centre + r + dx, centre + r), fill=fill)

    if thing.shape in ("circle", "ring", "moon"):
        disc(radius, 255)
    if thing.shape == "ring":
        disc(radius * 0.55, 0)
    if thing.shape == "moon":
        disc(radius * 0.85, 0, radius * 0.5)
    for outline in _outlines(thing.shape):
        draw.polygon([(centre + radius * x, centre + radius * y) for x, y in outline], fill=255)
    return mask.rotate(thing.angle, resample=Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BOX)


def _outlines(shape: str) -> list[list[tuple[float, float]]]:
    """Polygons in a circle of radius 1."""
    if shape == "star":
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return [[(r * math.cos(a), r * math.sin(a)) for r, a in zip((1.0, 0.42) * 5, angles, strict=True)]]
    bar = [(-0.97, -0.27), (0.97, -0.27), (0.97, 0.27), (-0.97, 0.27)]
    return {
        "square": [[(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]],
        "triangle": [[(0.0, -1.0), (0.87, 0.6), (-0.87, 0.6)]],
        "diamond": [[(0.0, -1.0), (0.62, 0.0), (0.0, 1.0), (-0.62, 0.0)]],
        "cross": [bar, [(y, x) for x, y in bar]],
    }.get(shape, [])


@functools.cache
def _font():
    from PIL import ImageFont

    return ImageFont.load_default(18)


@functools.cache
def _text_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of the plate of a sign."""
    left, _, right, _ = _font().getbbox(text)
    return math.ceil(right - left) + 8, 24
