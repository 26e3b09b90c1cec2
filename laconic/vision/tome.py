"""ToMe: like tokens are merged pair by pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.primitives.merge import Merge, bipartite
from laconic.registry import register
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.picture import Picture

ROUND = 8  # one of so many tokens goes in a round, so that the most similar go first


@register
@dataclass(frozen=True, kw_only=True)
class ToMe(VisionMethod):
    """Merges the tokens that are most alike, half of them with the other half, until the budget is met.

    Every second token looks for the most similar of the others; the most similar pairs become one, the mean of all that they
    stand for. An eighth of the tokens goes in a round. The original merges a few in every block of the encoder; here all are
    merged behind it, by projected features. Nothing is dropped, but small things drown in the mean.
    """

    id: ClassVar[str] = "tome"
    paper: ClassVar[str] = "Token Merging: Your ViT But Faster (2022)"
    verbs: ClassVar[tuple[str, ...]] = ("merge",)

    def reduce(self, picture: Picture, k: int) -> Reduction:
        into = torch.arange(len(picture.layout), device=picture.features.device)
        into[picture.layout.separators.to(into.device)] = -1
        merged = picture.features.float()
        left = picture.cells
        while len(left) > k:
            gone, target = bipartite(merged, left, min(len(left) - k, -(-len(left) // ROUND)))
            moved = into.clone()
            for token, partner in zip(gone.tolist(), target.tolist(), strict=True):
                moved[into == token] = partner
            into = moved
            merge = Merge(into)
            left = merge.kept
            merged = merged.index_copy(0, left, merge.mean(picture.features))
        return Reduction(left, merged[left], into)
