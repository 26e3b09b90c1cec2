"""DART: tokens that repeat a few pivots go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.picture import Picture
from laconic.vision.select import top


@register
@dataclass(frozen=True, kw_only=True)
class DART(VisionMethod):
    """Keeps a few pivots and, for each, the tokens that are least like it: what repeats a pivot goes.

    Pivots are the tokens with the smallest features (L1 norm). In turn each pivot takes the token of the smallest cosine with it
    that nobody has taken, until the budget is met. The original chooses by keys inside the language model and takes words as
    pivots too; here the projected features stand in for them, before its first layer.
    """

    id: ClassVar[str] = "dart"
    paper: ClassVar[str] = "Stop Looking for Important Tokens in MLLMs: Duplication Matters More (2025)"

    pivots: int = parameter(8, "pivots, as many as the budget at most", least=1, search=(4, 16))

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        features = picture.features.float()
        pivots = top(-features.abs().sum(-1), min(self.pivots, k), picture.cells)
        unit = torch.nn.functional.normalize(features, dim=-1)
        likeness = unit[pivots] @ unit.t()
        open_ = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        open_[picture.cells] = True
        open_[pivots] = False
        order = likeness.argsort(dim=-1, stable=True).tolist()
        kept, at, left = pivots.tolist(), [0] * len(pivots), open_.tolist()
        while len(kept) < k:
            turn = (len(kept) - len(pivots)) % len(pivots)
            while not left[order[turn][at[turn]]]:
                at[turn] += 1
            taken = order[turn][at[turn]]
            left[taken] = False
            kept.append(taken)
        return torch.tensor(sorted(kept), device=features.device)
