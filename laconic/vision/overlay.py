"""Pictures of what stays of a picture."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laconic.errors import LaconicError
from laconic.vision.see import Shown, View

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 336  # pixels of a panel
MARGIN, LINE = 12, 17
INK, PALE, RIGHT, WRONG = (24, 24, 27), (113, 113, 122), (22, 128, 60), (200, 30, 30)
MERGED = (56, 128, 255)
VEIL = (250, 250, 250)  # what dropped patches fade into


def overlay(picture: Image, shown: Shown, crop: int = 0, side: int = SIDE) -> Image:
    """The picture with dropped patches faded, merged ones tinted blue, and kept ones as they are.

    Args:
        crop: which of the encoder's crops; the picture is stretched over its grid.
        side: of the longer edge in pixels.
    """
    from PIL import Image

    height, width = shown.layout.shapes[crop]
    scale = max(1, side // max(height, width))
    base = np.asarray(picture.resize((width * scale, height * scale), Image.Resampling.LANCZOS), dtype=np.float32)
    depth, merged = grids(shown, crop)
    grey = base.mean(-1, keepdims=True).repeat(3, -1)
    gone = 0.18 * grey + 0.82 * np.array(VEIL, dtype=np.float32)
    taken = 0.35 * base + 0.65 * np.array(MERGED, dtype=np.float32)
    share = np.kron(depth, np.ones((scale, scale)))[..., None]
    into = np.kron(merged, np.ones((scale, scale)))[..., None]
    mixed = share * base + (1 - share) * (into * taken * 0.6 + into * gone * 0.4 + (1 - into) * gone)
    _lines(mixed, depth, scale)
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def grids(shown: Shown, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of the layers that hold each cell of a crop, and whether another token took it in, both ``(rows, columns)``."""
    layout, (height, width) = shown.layout, shown.layout.shapes[crop]
    depth, merged = np.zeros((height, width), dtype=np.float32), np.zeros((height, width), dtype=np.float32)
    here = (layout.crop == crop).nonzero()[:, 0]
    rows, columns = layout.row[here].numpy(), layout.column[here].numpy()
    depth[rows, columns] = shown.depth[here].numpy()
    if shown.into is not None:
        into = shown.into.cpu()
        merged[rows, columns] = ((into[here] >= 0) & (into[here] != here)).float().numpy()
    return depth, merged


def _lines(pixels: np.ndarray, depth: np.ndarray, scale: int) -> None:
    """A thin line around every group of patches that stay, where patches are large enough for one."""
    if scale < 4:
        return
    stays = np.pad(depth > 0, 1)
    for row, column in zip(*np.nonzero(depth > 0), strict=True):
        top, left = row * scale, column * scale
        bottom, right = top + scale, left + scale
        around = {
            "top": stays[row, column + 1], "bottom": stays[row + 2, column + 1],
            "left": stays[row + 1, column], "right": stays[row + 1, column + 2],
        }  # fmt: skip
        edges = {
            "top": (slice(top, top + 1), slice(left, right)), "bottom": (slice(bottom - 1, bottom), slice(left, right)),
            "left": (slice(top, bottom), slice(left, left + 1)), "right": (slice(top, bottom), slice(right - 1, right)),
        }  # fmt: skip
        for name, inside in around.items():
            if not inside:
                pixels[edges[name]] = INK


def panels(views: Sequence[View], pictures: Sequence[Image], question: str, columns: int = 4) -> Image:
    """All views side by side: what stays of every picture, the recipe, its answer, tokens and time."""
    from PIL import Image, ImageDraw

    made = [_panel(view, pictures, views[0]) for view in views]
    wide, high = max(p.width for p in made), max(p.height for p in made)
    columns = min(columns, len(made))
    rows = -(-len(made) // columns)
    heading = textwrap.wrap(question, max(20, columns * wide // 9)) or [""]
    top = MARGIN + len(heading) * (LINE + 5) + MARGIN
    page = Image.new("RGB", (columns * (wide + MARGIN) + MARGIN, top + rows * (high + MARGIN)), "white")
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(heading):
        draw.text((MARGIN, MARGIN + i * (LINE + 5)), line, fill=INK, font=_font(18))
    for i, panel in enumerate(made):
        page.paste(panel, (MARGIN + i % columns * (wide + MARGIN), top + i // columns * (high + MARGIN)))
    return page


def save_views(path: str | Path, views: Sequence[View], pictures: Sequence[Image], question: str) -> None:
    """Writes ``panels`` as a picture, or, where the name ends in .html, as a page that tells the score of every patch."""
    path = Path(path)
    try:
        if path.suffix.lower() in (".html", ".htm"):
            path.write_text(_page(views, pictures, question), encoding="utf-8")
        else:
            panels(views, pictures, question).save(path)
    except (OSError, ValueError) as error:
        raise LaconicError(f"The pictures cannot be written to {path} ({error}): give a path ending in .png or .html.") from None


def save_strip(path: str | Path, shown: Shown, picture: Image) -> None:
    """Writes one picture with what is ``shown`` of it."""
    try:
        _strip(shown, picture).save(path)
    except (OSError, ValueError) as error:
        raise LaconicError(f"The picture cannot be written to {path} ({error}): give a path ending in .png.") from None


def _page(views: Sequence[View], pictures: Sequence[Image], question: str) -> str:
    """A self-contained page: one figure per view and picture, with a title on every patch."""
    from jinja2 import Environment, PackageLoader

    figures = []
    for view in views:
        shown = [
            {
                "data": data_address(_strip(_shown(view, number), picture)),
                "cells": _cells(view.pictures[number]) if number < len(view.pictures) else [],
            }
            for number, picture in enumerate(pictures)
        ]
        figures.append({"view": view, "shown": shown, "kept": kept_of(view), "same": view.answer == views[0].answer})
    environment = Environment(loader=PackageLoader("laconic.evaluation", "templates"), autoescape=True)
    return environment.get_template("see.html.j2").render(question=question, figures=figures)


def kept_of(view: View) -> str:
    """How many tokens of each picture reach the last layer, as text."""
    return ", ".join(f"{p.kept} of {int((~p.layout.separators).sum())}" for p in view.pictures) or "all"


def _cells(shown: Shown) -> list[dict[str, str]]:
    """Squares over the whole picture's patches: where each lies in pixels, and what became of it."""
    layout, (height, width) = shown.layout, shown.layout.shapes[0]
    scale = max(1, SIDE // max(height, width))
    squares = []
    for token in (layout.crop == 0).nonzero()[:, 0].tolist():
        row, column, depth = int(layout.row[token]), int(layout.column[token]), float(shown.depth[token])
        fate = "kept" if depth == 1 else "dropped" if depth == 0 else f"in {depth:.0%} of the layers"
        if shown.into is not None and int(shown.into[token]) not in (-1, token):
            late = f"{fate}, then " if 0 < depth < 1 else ""
            fate = f"{late}merged into token {int(shown.into[token])}"
        score = "" if shown.scores is None else f", score {float(shown.scores[token]):.4g}"
        at = f"left:{column * scale}px;top:{row * scale}px;width:{scale}px;height:{scale}px"
        squares.append({"at": at, "title": f"token {token}, row {row}, column {column}: {fate}{score}"})
    return squares


def data_address(image: Image, kind: str = "png") -> str:
    """A picture as an address that holds it, to stand in a page; ``kind`` is png or, smaller, jpeg."""
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), optimize=True)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def _panel(view: View, pictures: Sequence[Image], dense: View) -> Image:
    """One view: its pictures, and below what is to be said."""
    from PIL import Image, ImageDraw

    shown = [_strip(_shown(view, number), picture) for number, picture in enumerate(pictures)]
    width = max(SIDE, max(image.width for image in shown))
    height = sum(image.height + 4 for image in shown)
    name = textwrap.wrap(view.recipe, width // 8)
    panel = Image.new("RGB", (width, height + MARGIN // 2 + LINE * (len(name) + 3)), "white")
    at = 0
    for image in shown:
        panel.paste(image, (0, at))
        at += image.height + 4
    draw = ImageDraw.Draw(panel)
    at += MARGIN // 2
    for line in name:
        draw.text((0, at), line, fill=INK, font=_font(14))
        at += LINE
    answer = textwrap.shorten(view.answer or "(nothing)", max(10, width // 8), placeholder=" ...")
    draw.text((0, at), answer, fill=RIGHT if view.answer == dense.answer else WRONG, font=_font(15))
    faster = "" if view is dense else f" ({dense.prefill_s / view.prefill_s:.1f}x)"
    said = f"{kept_of(view)} picture tokens, prefill {1000 * view.prefill_s:.0f} ms{faster}"
    draw.text((0, at + LINE + 2), said, fill=PALE, font=_font(13))
    return panel


def _shown(view: View, number: int) -> Shown | None:
    """What became of a picture of a view; None where nothing did."""
    return view.pictures[number] if number < len(view.pictures) else None


def _strip(shown: Shown | None, picture: Image) -> Image:
    """One picture: whole, and beside it in parts where the encoder saw parts."""
    from PIL import Image

    if shown is None:
        return picture.resize(_fit(picture.size))
    whole = overlay(picture, shown)
    rows, columns = shown.layout.parts
    if not rows:
        return whole
    height, width = shown.layout.shapes[0]
    size = SIDE // max(rows, columns)
    parts = Image.new("RGB", (columns * (size // width * width), rows * (size // height * height)), "white")
    wide, high = picture.width / columns, picture.height / rows
    for part in range(rows * columns):
        row, column = divmod(part, columns)
        piece = picture.crop((int(column * wide), int(row * high), int((column + 1) * wide), int((row + 1) * high)))
        done = overlay(piece, shown, part + 1, size)
        parts.paste(done, (column * done.width, row * done.height))
    strip = Image.new("RGB", (whole.width + 4 + parts.width, max(whole.height, parts.height)), "white")
    strip.paste(whole, (0, 0))
    strip.paste(parts, (whole.width + 4, 0))
    return strip


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    scale = SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)
