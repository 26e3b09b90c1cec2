"""Made-up pictures: features and attention as a test wants them, without a model."""

from __future__ import annotations

import torch

from laconic.vision.picture import Layout, Picture, grid


class FakeTrace:
    """Stands for what an encoder's attention gave: ``found[kind]``, or ``found[kind, layer]`` where blocks differ."""

    def __init__(self, found: dict, depth: int = 8, has_class: bool = True) -> None:
        self.found, self.depth, self.has_class = found, depth, has_class

    def get(self, kind: str, layer: int) -> torch.Tensor:
        return self.found.get((kind, layer), self.found.get(kind))


def picture(
    features: torch.Tensor,
    layout: Layout | None = None,
    text: torch.Tensor | None = None,
    projector=None,
    encoded: torch.Tensor | None = None,
    has_class: bool = True,
    depth: int = 8,
    **found: torch.Tensor,
) -> Picture:
    """``features`` (n, dim) in a square of one crop, unless ``layout`` says otherwise. Attention: ``cls`` and ``received``
    (crops, patches), ``keys`` (crops, heads, 1 + patches, width); ``cls_0`` is that of block 0, ``cls_m2`` of block -2."""
    side = round(len(features) ** 0.5)
    layout = layout or grid(side, side)
    text = torch.zeros(1, features.shape[1]) if text is None else text
    parsed = {}
    for name, value in found.items():
        kind, _, layer = name.partition("_")
        parsed[(kind, int(layer.replace("m", "-"))) if layer else kind] = value
    given = features[None] if encoded is None else encoded
    return Picture(
        features=features, layout=layout, text=text,
        after=torch.ones(len(text), dtype=torch.bool), trace=FakeTrace(parsed, depth, has_class), encoded=given,
        projector=projector,
    )  # fmt: skip


def in_parts(rows: int, columns: int, side: int) -> Layout:
    """A whole picture and its parts, all of ``side`` x ``side`` tokens, without separators."""
    plain = grid(side, side, 1 + rows * columns)
    return Layout(plain.crop, plain.row, plain.column, plain.shapes, (rows, columns))


def clusters(sizes: list[int], dim: int = 16, spread: float = 0.02, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around orthogonal centres, ``(n, dim)``, and the cluster of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q[: len(sizes)]
    member = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    member = member[torch.randperm(len(member), generator=generator)]
    return centres[member] + spread * torch.randn(len(member), dim, generator=generator), member
