"""IDPruner: important tokens that do not repeat each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.scores import SCORES, wants_of
from laconic.vision.select import relevant


@register
@dataclass(frozen=True, kw_only=True)
class IDPruner(VisionMethod):
    """Keeps tokens by marginal relevance: a token's importance less its likeness to what is already kept.

    ``share`` weighs the two: 1 keeps the most important, 0 the most diverse. The first is the most important. The source learns
    the importance for each model; here any score of a token stands in for it, by default what the encoder attends to.
    """

    id: ClassVar[str] = "idpruner"
    paper: ClassVar[str] = "IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs (2026)"

    share: float = parameter(0.5, "weight of importance against diversity", least=0, search=(0.25, 0.75))
    score_by: str = parameter("salience", f"importance: {', '.join(SCORES)}")

    def check(self) -> None:
        super().check()
        self.require(self.share <= 1, "share lies between 0 and 1.")
        self.require(self.score_by in SCORES, f"score_by is one of {', '.join(SCORES)}.")

    def wants(self, depth: int) -> set[Want]:
        return wants_of(self.score_by)

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        return relevant(picture, SCORES[self.score_by](picture), k, picture.cells, self.share)
