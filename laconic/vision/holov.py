"""HoloV: every piece of a picture keeps something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.regions import by_worth, floors, pieces_of, share_out, stretches, tiles, top_of_regions


@register
@dataclass(frozen=True, kw_only=True)
class HoloV(VisionMethod):
    """Cuts a picture into rectangles, gives each a share of the budget, and keeps the best of each.

    A rectangle is worth the mean of its tokens' scores: attention of the encoder plus ``variety`` times the variance of a token's
    cosines within its rectangle, scaled to the attention. Because of that scaling, the variance changes no rectangle's share,
    only what stays within one. The number of rectangles follows from the budget, so that one holds about half as many tokens as
    are kept. The released code cuts the row of all tokens into stretches, whatever rows of the picture they lie in, keeps of each
    what has most attention, whatever the score, and loses what a stretch is given beyond its tokens: ``faithful_code`` does so
    too.
    """

    id: ClassVar[str] = "holov"
    paper: ClassVar[str] = "Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention (2025)"

    variety: float = parameter(0.09, "weight of the variance of cosines", least=0)
    pieces: int = parameter(0, "about so many rectangles; 0: 16/9 of the tokens over the budget", least=0, search=())
    faithful_code: bool = parameter(False, "as released: stretches of the row of tokens, best by attention alone", search=())

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", -2)}

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        cells = picture.cells
        attention = picture.salience(-2)
        pieces = self.pieces or pieces_of(len(cells), k)
        members = stretches(cells, pieces) if self.faithful_code else tiles(picture.layout, pieces)
        score = attention.clone()
        for part in members:
            score[part] += self.variety * variety_of(picture.features[part], attention[part])
        caps = torch.tensor([len(part) for part in members], device=score.device)
        weights = by_worth(members, score, total=False)
        if not self.faithful_code:
            return top_of_regions(score, members, share_out(weights, k, caps))
        quotas = floors(weights, k)
        quotas[weights.argsort(descending=True, stable=True)[: k - int(quotas.sum())]] += 1
        return top_of_regions(attention, members, quotas.minimum(caps))


def variety_of(features: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Variance of each token's cosines with the others of its piece, ``(c,)``, scaled to the mean of their attention."""
    count = len(features)
    if count < 2:
        return attention.abs()
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    cosine = (unit @ unit.t()).fill_diagonal_(0.0)
    mean = cosine.sum(-1, keepdim=True) / (count - 1)
    variance = ((cosine - mean) ** 2).sum(-1) / (count - 1)
    return variance * attention.abs().mean() / variance.mean().clamp(min=1e-12)
