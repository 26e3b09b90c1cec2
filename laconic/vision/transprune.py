"""TransPrune: tokens that the layers rewrite, and that the words look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer, Request
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import StagedMethod, by_words, pictures_in
from laconic.vision.watch import add_at, rows_at

TABLE = "transprune.transitions"


@register
@dataclass(frozen=True, kw_only=True)
class TransPrune(StagedMethod):
    """Keeps the picture tokens that attention and feed-forward parts change most, and that the words behind the picture look at.

    A part's change of a token is how much longer it makes it, times the softmax over all tokens of how far it turns it away from
    its line (one minus the size of the cosine of what goes in and what comes out). The released code takes one minus the cosine,
    so that what turns to the opposite counts most: ``faithful_code`` does so too. Changes add up over the layers from the first
    that counts on; they and the mean attention of the words, each to sum 1 over the picture, count alike. The budget is the mean
    over the layers, in stages that each keep the same share. The attention is that of the layer that has just run, so that a drop
    comes one layer later than in the source, which computes it twice.
    """

    id: ClassVar[str] = "transprune"
    paper: ClassVar[str] = "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model (2025)"
    watches_parts: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    since: float = parameter(0.2, "depth from which changes add up, as a share of the layers", least=0, search=())
    words: float = parameter(0.5, "share of the words' attention in the sum", least=0, search=(0.0, 1.0))
    faithful_code: bool = parameter(False, "as released: a turn to the opposite is the largest", search=())

    def check(self) -> None:
        super().check()
        self.require(self.since < 1 and self.words <= 1, "since is below 1, and words a share of at most 1.")

    def begins(self, request: Request) -> int:
        """The layer from which on changes add up: before the first drop, if that is not in the first layer."""
        picture = request.looked[0]
        return min(int(self.since * len(request.layers)), *self.plan(request, len(picture.cells), picture.given))

    def watched(self, request: Request, layer: int, part: str, given: torch.Tensor, made: torch.Tensor) -> None:
        first = self.begins(request)
        if layer >= first:
            known = None if (layer, part) == (first, "attention") else request.memory[TABLE]
            change = transition(given.float(), made.float(), rows_at(request), opposite=self.faithful_code)
            request.memory[TABLE] = add_at(known, request, change)

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        worth, request = by_words(layer, call, lambda attention: attention.mean(0)), layer.request
        if layer.index <= self.begins(request):  # its parts have not been told yet
            return worth
        for picture in pictures_in(layer):
            row, slots = picture.row, picture.slots
            looked, changed = worth[row, slots], request.memory[TABLE][row, layer.shared_positions[row, 0, slots]]
            shares = [part / part.sum().clamp(min=1e-12) for part in (changed, looked)]
            worth[row, slots] = (1 - self.words) * shares[0] + self.words * shares[1]
        return worth


def transition(given: torch.Tensor, made: torch.Tensor, at: torch.Tensor, *, opposite: bool = False) -> torch.Tensor:
    """How much a part changes each token, ``(batch, rows)``: ratio of lengths times softmax of one minus the size of the cosine.

    ``at``: positions of the rows, -1 for padding, which takes no part. ``opposite``: the cosine with its sign.
    """
    ratio = made.norm(dim=-1) / given.norm(dim=-1).clamp(min=1e-12)
    cosine = torch.nn.functional.cosine_similarity(given, made, dim=-1)
    turn = 1 - (cosine if opposite else cosine.abs())
    return ratio * turn.masked_fill(at.to(turn.device) < 0, float("-inf")).softmax(-1)
