"""One picture inside a prompt: its tokens, where each lies, and what the encoder thinks of it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.vision.encoder import Trace

SEPARATOR = -1  # the crop of a token that is no part of the picture, such as the mark at the end of a row


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one picture lie, each int64 ``(n,)``.

    Attributes:
        crop: which of the pictures that the encoder saw, counted from 0 within this picture; -1 for separators. Where a picture
            comes whole and in parts, 0 is the whole; those of a video are its frames.
        row, column: cell within the crop's grid of tokens; -1 for separators.
        shapes: rows and columns of each crop's grid.
        parts: rows and columns of the arrangement of the crops from 1 on; (0, 0) where there are none.
    """

    crop: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    shapes: tuple[tuple[int, int], ...]
    parts: tuple[int, int] = (0, 0)

    @property
    def separators(self) -> torch.Tensor:
        return self.crop == SEPARATOR

    @property
    def whole(self) -> torch.Tensor:
        """The tokens that together show all of the picture once, int64 ascending: of crop 0 where it comes in parts as well."""
        return (self.crop == 0 if any(self.parts) else ~self.separators).nonzero()[:, 0]

    @property
    def index(self) -> torch.Tensor:
        """Number of the cell among all cells of all crops in order; 0 for separators."""
        sizes = torch.tensor([0, *(h * w for h, w in self.shapes)]).cumsum(0).to(self.crop.device)
        widths = torch.tensor([w for _, w in self.shapes], device=self.crop.device)
        crop = self.crop.clamp(min=0)
        return (sizes[crop] + self.row * widths[crop] + self.column).masked_fill(self.separators, 0)

    def __len__(self) -> int:
        return len(self.crop)


def grid(height: int, width: int, crops: int = 1) -> Layout:
    """The layout of ``crops`` pictures one after another, each row by row."""
    crop = torch.arange(crops).repeat_interleave(height * width)
    row = torch.arange(height).repeat_interleave(width).repeat(crops)
    column = torch.arange(width).repeat(height * crops)
    return Layout(crop, row, column, ((height, width),) * crops)


@dataclass
class Picture:
    """What a method sees of one picture.

    Attributes:
        features: ``(n, dim)``, the tokens as the language model would get them, in the order of the prompt.
        layout: where each lies.
        text: ``(m, dim)``, the words of the same prompt, without its pictures.
        after: boolean ``(m,)``: the words that stand behind the picture.
        encoded: ``(crops, 1 or 0 + patches, width)``, the encoder's own features of its crops, where the model hands them on.
        first: number of this picture's first crop among those that the encoder saw.
        window: where the encoder works on one row of all patches, this picture's (first, last + 1).
        number: of the picture in the forward; projector: what makes tokens of the encoder's features.
        pixels: ``(crops, 3, height, width)`` as the encoder was given them, where it was given a grid of them.
        model: the model that looks at it, for methods that have to know which it is.
        from_words: float32 ``(n,)``, attention that each token gets from the words behind the picture in the language model's
            first layer, before anything is dropped: the mean over heads and words. None where no method ``reads_first_layer``,
            and where no word stands behind it.
        given: how many of the tokens that compete go into the language model's first layer; None before that is known.
        order: where the encoder has its patches in another order than the layout's cells, the place of each cell's patches.
    """

    features: torch.Tensor
    layout: Layout
    text: torch.Tensor
    after: torch.Tensor
    trace: Trace | None = None
    encoded: torch.Tensor | None = None
    first: int = 0
    window: tuple[int, int] | None = None
    order: torch.Tensor | None = None
    number: int = 0
    pixels: torch.Tensor | None = None
    projector: Any = None
    model: Any = None
    from_words: torch.Tensor | None = None
    given: int | None = None

    @functools.cached_property
    def cells(self) -> torch.Tensor:
        """Tokens that compete: all but separators, int64 ``(c,)`` ascending."""
        return (~self.layout.separators).nonzero()[:, 0]

    @property
    def question(self) -> torch.Tensor:
        """The words behind the picture, ``(w, dim)``; all words where none stands behind it."""
        return self.text[self.after] if bool(self.after.any()) else self.text

    def padding(self) -> torch.Tensor:
        """Tokens that show only padding, boolean ``(n,)``: bars of one colour along the edges; none without pixels."""
        gone = torch.zeros(len(self.layout), dtype=torch.bool, device=self.features.device)
        for crop in range(len(self.layout.shapes)) if self.pixels is not None else ():
            bars = bar_cells(self.pixels[crop].float(), *self.layout.shapes[crop])
            here = self.layout.crop == crop
            gone[here.to(gone.device)] = bars[self.layout.row[here], self.layout.column[here]].to(gone.device)
        return gone

    def cls(self, layer: int = -2) -> torch.Tensor:
        """Attention of the class token, float32 ``(n,)``: the sum over the patches of a token; 0 for separators."""
        return self.of_patches(self.recorded("cls", layer), "sum")

    def received(self, layer: int = -2) -> torch.Tensor:
        """Attention received from all patches, as ``cls``."""
        return self.of_patches(self.recorded("received", layer), "sum")

    def salience(self, layer: int = -2) -> torch.Tensor:
        """``cls`` where the encoder has a class token, ``received`` otherwise."""
        return self.cls(layer) if self.trace.has_class else self.received(layer)

    def keys(self, layer: int = -2) -> torch.Tensor:
        """Keys of the block, mean over heads and over the patches of a token, float32 ``(n, head_dim)``."""
        found = self.recorded("keys", layer)[:, :, int(self.trace.has_class) :].float().mean(1)
        return self.of_patches(found, "mean")

    def encoded_tokens(self) -> torch.Tensor:
        """What the projector was given, mean over the patches of a token, float32 ``(n, width)``; 0 for separators."""
        given, cells = self.projector_input().float(), sum(h * w for h, w in self.layout.shapes)
        if given.dim() == 2:  # one row of all patches, members of a cell side by side
            return self.of_inputs(given.unflatten(0, (cells, -1)).mean(1))
        if given.shape[1] * len(given) != cells:
            given = pool_cells(given, *self.layout.shapes[0], "mean")
        return self.of_inputs(given.flatten(0, 1))

    def projector_input(self) -> torch.Tensor:
        """Its part of what the projector was given: ``(crops, patches, width)``, or ``(patches, width)`` of one row."""
        if self.window is not None:
            return self.encoded.flatten(0, -2)[self.window[0] : self.window[1]]
        return self.encoded[self.first : self.first + len(self.layout.shapes)]

    def project(self, given: torch.Tensor) -> torch.Tensor:
        """The cells of ``given``, as ``projector_input`` is, float32 ``(cells, dim)`` in the projector's own order."""
        with torch.no_grad():
            made = self.projector(given).float()
        if self.window is None and made.shape[1] * len(made) != sum(h * w for h, w in self.layout.shapes):
            made = pool_cells(made, *self.layout.shapes[0], "mean")  # the model pools behind the projector
        return made.flatten(0, -2)

    def of_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the cells, in the projector's order, as values of the tokens; 0 for separators."""
        index = self.layout.index.to(values.device)
        if self.order is not None:
            index = self.order.to(values.device)[index]
        found = values[index]
        gone = self.layout.separators.to(values.device)
        return found.masked_fill(gone if found.dim() == 1 else gone[:, None], 0.0)

    def recorded(self, kind: str, layer: int) -> torch.Tensor:
        """What a block's attention was asked for (see ``Want``), of this picture's crops."""
        found, crops = self.trace.get(kind, layer), len(self.layout.shapes)
        if self.window is None:
            return found[self.first : self.first + crops]
        row = found[0].narrow(0 if found.dim() == 2 else 1, self.window[0], self.window[1] - self.window[0])
        return row.unflatten(0, (crops, -1)) if row.dim() == 1 else row.unflatten(1, (crops, -1)).movedim(1, 0)

    def of_patches(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """Values of the patches ``(crops, patches)`` or ``(crops, patches, width)`` as values of the tokens, float32 ``(n,)`` or
        ``(n, width)``: the ``sum`` or ``mean`` over those that made a token; 0 for separators."""
        flat = values[..., None] if values.dim() == 2 else values
        flat = flat.float()
        if self.order is not None:  # one row of all patches, members of a cell side by side
            pooled = flat.flatten(0, 1).unflatten(0, (sum(h * w for h, w in self.layout.shapes), -1))
            pooled = (pooled.sum(1) if how == "sum" else pooled.mean(1))[self.order]
        else:
            height, width = self.layout.shapes[0]
            pooled = pool_cells(flat, height, width, how).flatten(0, 1)
        result = pooled[self.layout.index.to(pooled.device)]
        result = result.masked_fill(self.layout.separators.to(pooled.device)[:, None], 0.0)
        return result[:, 0] if values.dim() == 2 else result


def bar_cells(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cells that lie in a bar of one colour along an edge, boolean ``(height, width)``, of ``pixels`` (3, rows, columns)."""
    found = torch.zeros(height, width, dtype=torch.bool)
    for dim, count in ((1, height), (2, width)):
        lines = pixels.movedim(dim, 0).flatten(1)  # one row per line of pixels
        size = lines.shape[0] // count
        for step in (1, -1):
            edge = lines[0 if step == 1 else -1]
            colour = edge.view(3, -1)[:, :1].expand(3, edge.numel() // 3).flatten()
            same = (lines - colour).abs().amax(-1) < 1e-4
            same = same if step == 1 else same.flip(0)
            run = int((~same).nonzero()[0]) if bool((~same).any()) else len(same)
            cells = slice(0, run // size) if step == 1 else slice(count - run // size, count)
            if dim == 1:
                found[cells] = True
            else:
                found[:, cells] = True
    return found if not bool(found.all()) else torch.zeros_like(found)


def pool_cells(patches: torch.Tensor, height: int, width: int, how: str) -> torch.Tensor:
    """A square grid of patches ``(crops, patches, width)`` to ``height`` x ``width`` cells, ``(crops, cells, width)``.

    Cells that share patches weigh them as a bilinear resize does, as LLaVA-OneVision makes tokens of frames.
    """
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise LaconicError(f"The encoder's {patches.shape[1]} patches are no square to divide into {height} x {width} tokens.")
    if side % height or side % width:
        rows = patches.mT.unflatten(-1, (side, side))
        cells = torch.nn.functional.interpolate(rows, size=(height, width), mode="bilinear").flatten(2).mT
        return cells * (side * side / (height * width)) if how == "sum" else cells
    blocks = patches.view(len(patches), height, side // height, width, side // width, -1)
    blocks = blocks.sum((2, 4)) if how == "sum" else blocks.mean((2, 4))
    return blocks.flatten(1, 2)
