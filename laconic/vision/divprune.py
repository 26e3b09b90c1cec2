"""DivPrune: the tokens that are most unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.picture import Picture
from laconic.vision.select import farthest


@register
@dataclass(frozen=True, kw_only=True)
class DivPrune(VisionMethod):
    """Keeps the tokens that are farthest from each other by cosine, found one by one: max-min diversity.

    The first is the one whose nearest neighbour is farthest. Looks at projected features only, neither at attention nor at the
    question. A copy of a kept token is never added while anything else remains; outliers come early.
    """

    id: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (2025)"

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        return farthest(picture, torch.ones(len(picture.layout), device=picture.features.device), k, picture.cells)
