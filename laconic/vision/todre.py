"""ToDRE: diverse tokens before the language model, and none after the layer where it stops looking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.primitives.greedy import MaxRule, SumRule
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.select import best, pick

VARIANTS = ("sum", "kcenter")


@register
@dataclass(frozen=True, kw_only=True)
class ToDRE(VisionMethod):
    """Keeps a diverse set of tokens: each next one is the least like all that are kept, beginning with the most salient.

    ``variant=sum`` adds up the cosines with what is kept, as the paper's second version; ``kcenter`` takes the largest, as its
    first. The most salient token is looked for in the whole picture where that comes with parts. The second stage, dropping all
    that is left late in the language model, is the method ``withdraw``: ``todre:10% + withdraw``.
    """

    id: ClassVar[str] = "todre"
    paper: ClassVar[str] = "ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient LVLMs (2025)"

    variant: str = parameter("sum", "sum or kcenter: likeness to all kept tokens together, or to the nearest")

    def check(self) -> None:
        super().check()
        self.require(self.variant in VARIANTS, f"variant is one of {', '.join(VARIANTS)}.")

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", -1)}

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        first = best(picture.salience(-1), picture.layout.whole)
        return pick(picture.features, k, SumRule() if self.variant == "sum" else MaxRule(), picture.cells, first)
