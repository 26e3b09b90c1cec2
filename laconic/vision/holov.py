"""HoloV: every stretch of a picture keeps something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.regions import by_worth, pieces_of, share_out, stretches, top_of_regions


@register
@dataclass(frozen=True, kw_only=True)
class HoloV(VisionMethod):
    """Cuts a picture into stretches of its tokens, gives each a share of the budget, and keeps the best of each.

    A stretch is worth the mean of its tokens' scores: attention of the encoder plus ``variety`` times the variance of a token's
    cosines within its stretch, scaled to the attention. Because of that scaling, the variance changes no stretch's share; with
    ``rank_by=attention``, as released, it has no say within one either. The number of stretches follows from the budget, so that
    one holds about half as many tokens as are kept.
    """

    id: ClassVar[str] = "holov"
    paper: ClassVar[str] = "Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention (2025)"

    variety: float = parameter(0.09, "weight of the variance of cosines", least=0)
    rank_by: str = parameter("score", "what decides within a stretch: score, or attention, as released", search=("attention",))
    pieces: int = parameter(0, "stretches; 0: 16/9 of the tokens over the budget", least=0, search=())

    def check(self) -> None:
        super().check()
        self.require(self.rank_by in ("score", "attention"), "rank_by is score or attention.")

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", -2)}

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        cells = picture.cells
        attention = picture.salience(-2)
        members = stretches(cells, self.pieces or pieces_of(len(cells), k))
        score = attention.clone()
        for part in members:
            score[part] += self.variety * variety_of(picture.features[part], attention[part])
        caps = torch.tensor([len(part) for part in members], device=score.device)
        quotas = share_out(by_worth(members, score, total=False), k, caps)
        return top_of_regions(score if self.rank_by == "score" else attention, members, quotas)


def variety_of(features: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Variance of each token's cosines with the others of its stretch, ``(c,)``, scaled to the mean of their attention."""
    count = len(features)
    if count < 2:
        return attention.abs()
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    cosine = (unit @ unit.t()).fill_diagonal_(0.0)
    mean = cosine.sum(-1, keepdim=True) / (count - 1)
    variance = ((cosine - mean) ** 2).sum(-1) / (count - 1)
    return variance * attention.abs().mean() / variance.mean().clamp(min=1e-12)
