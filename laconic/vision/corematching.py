"""CoreMatching: tokens that fire the neurons of the sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer, Request
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import InsideMethod
from laconic.vision.watch import add_at, rows_at

TABLE = "corematching.overlap"


@register
@dataclass(frozen=True, kw_only=True)
class CoreMatching(InsideMethod):
    """Keeps the picture tokens that activate the same neurons of the feed-forward part as the prompt as a whole.

    A token's core neurons are the share ``token_share`` of its largest positive activations; the sentence's are the share
    ``core_share`` of all neurons that are core for most tokens. A token's worth is how many of the sentence's core neurons it
    activates in layer number ``layers``; the one after it is the last that computes the whole picture. The source takes those
    above the elbow of the sorted curve, so that their number is an outcome; here the budget says how many. Only the token part:
    that decoding computes core neurons alone is left out.
    """

    id: ClassVar[str] = "corematching"
    paper: ClassVar[str] = "CoreMatching: Co-adaptive Sparse Inference with Token and Neuron Pruning for VLMs (2025)"
    watches_parts: ClassVar[tuple[str, ...]] = ("neurons",)

    layers: int = parameter(2, "number of the layer whose neurons decide, from 1", least=1, search=(1, 3))
    token_share: float = parameter(0.4, "share of a token's positive activations that is core", least=0, search=())
    core_share: float = parameter(0.4, "share of all neurons that are the sentence's core", least=0, search=(0.2,))

    def check(self) -> None:
        super().check()
        self.require(self.token_share <= 1 and self.core_share <= 1, "token_share and core_share are shares: give at most 1.")

    def stays(self, n: int, layers: int) -> dict[int, int]:
        return {self.last(layers): self.budget.tokens(n)}

    def last(self, layers: int) -> int:
        """The last layer, from 0, of ``layers`` that computes the whole picture; the neurons are those of the one before."""
        return max(1, min(self.layers, layers - 2))

    def watched(self, request: Request, layer: int, part: str, given: torch.Tensor, made: torch.Tensor) -> None:
        if layer == self.last(len(request.layers)) - 1:
            real = rows_at(request).to(given.device) >= 0
            request.memory[TABLE] = add_at(None, request, overlap(given.float(), real, self.token_share, self.core_share))

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return layer.request.memory[TABLE].gather(1, layer.shared_positions[:, 0].clamp(min=0))


def overlap(activations: torch.Tensor, real: torch.Tensor, token_share: float, core_share: float) -> torch.Tensor:
    """How many core neurons of its sentence each token fires, float ``(batch, n)``, of ``activations`` (batch, n, neurons)."""
    result = torch.zeros(real.shape, device=real.device)
    for row in range(len(activations)):
        z = activations[row, real[row]]
        positive = (z > 0).sum(-1)
        rank = z.argsort(dim=-1, descending=True).argsort(dim=-1)
        core = rank < (positive.float() * token_share).ceil()[:, None]
        votes = core.sum(0)
        sentence = votes.argsort(descending=True, stable=True)[: max(1, round(core_share * z.shape[-1]))]
        result[row, real[row]] = (z[:, sentence] > 0).sum(-1).float()
    return result
