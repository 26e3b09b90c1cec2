"""TransPrune: tokens that the layers rewrite, and that the words look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer, Request
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import InsideMethod, by_words, picture_numbers
from laconic.vision.schedule import falling
from laconic.vision.watch import add_at, rows_at

TABLE = "transprune.transitions"


@register
@dataclass(frozen=True, kw_only=True)
class TransPrune(InsideMethod):
    """Keeps the picture tokens that attention and feed-forward parts change most, and that the words behind the picture look at.

    A part's change of a token is how much longer it makes it, times the softmax over all tokens of how far it turns it (one minus
    the cosine of what goes in and what comes out). Changes add up over the layers from the first that counts on; they and the
    mean attention of the words, each to sum 1 over the picture, count alike. The budget is the mean over the layers, in stages
    that each keep the same share. The attention is that of the layer that has just run, so that a drop comes one layer later than
    in the source, which computes it twice.
    """

    id: ClassVar[str] = "transprune"
    paper: ClassVar[str] = "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model (2025)"
    watches_parts: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    stages: int = parameter(4, "groups of layers that see the same tokens", least=2, search=(3, 6))
    since: float = parameter(0.2, "depth from which changes add up, as a share of the layers", least=0, search=())
    words: float = parameter(0.5, "share of the words' attention in the sum", least=0, search=(0.0, 1.0))

    def check(self) -> None:
        super().check()
        self.require(self.since < 1 and self.words <= 1, "since is below 1, and words a share of at most 1.")

    def stays(self, n: int, layers: int) -> dict[int, int]:
        return falling(self.budget, n, layers, self.stages)

    def watched(self, request: Request, layer: int, part: str, given: torch.Tensor, made: torch.Tensor) -> None:
        first = int(self.since * len(request.layers))
        ends = self.stays(1000, len(request.layers))
        if layer < min(first, *ends):
            return
        change = transition(given.float(), made.float(), request)
        request.memory[TABLE] = add_at(request.memory.get(TABLE) if layer or part != "attention" else None, request, change)

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        looked = by_words(layer, call, lambda attention: attention.mean(0))
        table = layer.request.memory.get(TABLE)
        changed = torch.zeros_like(looked)
        if table is not None:
            changed = table.gather(1, layer.shared_positions[:, 0].clamp(min=0, max=table.shape[1] - 1))
        numbers = picture_numbers(layer)
        return (1 - self.words) * _shares(changed, numbers) + self.words * _shares(looked, numbers)


def transition(given: torch.Tensor, made: torch.Tensor, request: Request) -> torch.Tensor:
    """How much a part changes each token, ``(batch, rows)``: ratio of lengths times softmax of one minus the cosine."""
    ratio = made.norm(dim=-1) / given.norm(dim=-1).clamp(min=1e-12)
    turn = 1 - torch.nn.functional.cosine_similarity(given, made, dim=-1)
    real = rows_at(request).to(turn.device) >= 0
    return ratio * turn.masked_fill(~real, float("-inf")).softmax(-1)


def _shares(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """``values`` (batch, n) of each picture's entries over their sum; others 0."""
    result = torch.zeros_like(values)
    for picture in numbers.unique().tolist():
        if picture >= 0:
            own = numbers == picture
            result[own] = values[own] / values[own].sum().clamp(min=1e-12)
    return result
