"""AdaToken-3D: the fewest tokens that together give the words what they take from the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import InsideMethod, by_words, everything, pictures_in


@register
@dataclass(frozen=True, kw_only=True)
class AdaToken3D(InsideMethod):
    """Keeps, layer by layer, the fewest picture tokens that give the words all but ``lost`` of their attention to the picture.

    A token's contribution is the attention that the words behind the picture give to it, summed over them; tokens enter by
    falling contribution until their sum reaches the share. How many stay is an outcome, so that there is no budget. At least
    ``floor`` of a picture stays. The source prunes spatial tokens of 3-D models by profiles of many samples, and published no
    code: this is our reading of its gate.
    """

    id: ClassVar[str] = "adatoken3d"
    paper: ClassVar[str] = "AdaToken-3D: Dynamic Spatial Gating for Efficient 3D Large Multimodal-Models Reasoning (2025)"
    takes_budget: ClassVar[bool] = False
    claims: ClassVar[tuple[Claim, ...]] = ()

    lost: float = parameter(0.05, "share of the attention to the picture that may be lost per layer", least=0, search=(0.02, 0.1))
    first: int = parameter(2, "layers that see everything", least=1, search=(1, 4))
    floor: float = parameter(0.05, "share of a picture's tokens that stay in any case", least=0, search=())

    def check(self) -> None:
        self.require(self.budget.is_full, "how many stay follows from lost, so it takes no budget.")
        self.require(self.lost < 1 and self.floor <= 1, "lost and floor are shares: give less than 1.")

    def leave(self, layer: KVLayer, call: Call) -> None:
        if self.lost == 0 or not self.first - 1 <= layer.index < layer.layers - 1 or layer.request.pictures is None:
            return
        contribution, stays = by_words(layer, call, lambda attention: attention.sum(0)), everything(layer)
        for picture in pictures_in(layer):
            row, slots = picture.row, picture.slots
            stays[row, slots] = nucleus(contribution[row, slots], self.lost, round(self.floor * picture.size))
        self.go_on(layer, stays)


def nucleus(worth: torch.Tensor, lost: float, least: int = 1) -> torch.Tensor:
    """Boolean ``(n,)``: the fewest entries whose ``worth`` sums to all but the share ``lost``, at least ``least`` and 1."""
    order = worth.argsort(descending=True, stable=True)
    reached = worth[order].double().cumsum(0)
    count = int((reached < (1 - lost) * float(worth.double().sum()) - 1e-12).sum()) + 1
    chosen = torch.zeros_like(worth, dtype=torch.bool)
    chosen[order[: min(len(order), max(count, least, 1))]] = True
    return chosen
