"""CoreMatching: tokens that fire the neurons of the sentence, and these neurons alone while it is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer, Request
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import InsideMethod
from laconic.vision.neurons import CHOSEN
from laconic.vision.watch import add_at, rows_at

TABLE = "corematching.overlap"
REFERENCE = 5  # the released code compares with the fifth token from the end


@register
@dataclass(frozen=True, kw_only=True)
class CoreMatching(InsideMethod):
    """Keeps the picture tokens that activate the same neurons of the feed-forward part as the prompt as a whole.

    A token's core neurons are the share ``token_share`` of its largest positive activations; the sentence's are the share
    ``core_share`` of all neurons that are core for most tokens. A token's worth is how many of the sentence's core neurons it
    activates in layer number ``layers``; the one after it is the last that computes the whole picture. The source takes those
    above the elbow of the sorted curve, so that their number is an outcome; here the budget says how many. The released code
    compares with a single token, the fifth from the end of the prompt, by all neurons that are on in both: ``faithful_code`` does
    so too. It also sets the keys of the others to zero instead of dropping them, which takes attention away from the rest; that
    is not repeated here.

    With ``neurons`` below 1, the steps after a prompt with pictures compute only that share of every layer's feed-forward part:
    the neurons that are core for most tokens there. Their rows and columns are copied once, at the end of the prompt, so that a
    step reads so much less; the copy takes the same share of the feed-forward weights in memory. Rows of a batch have neurons of
    their own, so that no row depends on the others; what is copied and computed is the union, which grows with the batch. The
    source keeps 0.4 to 0.6; here it is 1, all of them, unless asked for, so that the budget alone tells what is left out.
    """

    id: ClassVar[str] = "corematching"
    paper: ClassVar[str] = "CoreMatching: Co-adaptive Sparse Inference with Token and Neuron Pruning for VLMs (2025)"
    watches_parts: ClassVar[tuple[str, ...]] = ("neurons",)

    layers: int = parameter(2, "number of the layer whose neurons decide, from 1", least=1, search=(1, 3))
    token_share: float = parameter(0.4, "share of a token's positive activations that is core", least=0, search=())
    core_share: float = parameter(0.4, "share of all neurons that are the sentence's core", least=0, search=(0.2,))
    neurons: float = parameter(1.0, "share of the neurons that steps compute", least=0, search=(0.6, 0.4))
    faithful_code: bool = parameter(False, "as released: neurons shared with the fifth token from the end", search=())

    def check(self) -> None:
        super().check()
        shares = self.token_share, self.core_share, self.neurons
        self.require(max(shares) <= 1, "token_share, core_share and neurons are shares: give at most 1.")
        self.require(self.neurons > 0, "without neurons no step can be computed: give a share above 0, or 1 for all.")

    @property
    def narrows_steps(self) -> bool:
        """Whether steps compute a part of the neurons (see ``StepNeurons``)."""
        return self.neurons < 1

    def stays(self, n: int, given: tuple[int, ...]) -> dict[int, int]:
        return {self.last(len(given)): self.budget.tokens(n)}

    def last(self, layers: int) -> int:
        """The last layer, from 0, of ``layers`` that computes the whole picture; the neurons are those of the one before."""
        return max(1, min(self.layers, layers - 2))

    def watched(self, request: Request, layer: int, part: str, given: torch.Tensor, made: torch.Tensor) -> None:
        real = rows_at(request).to(given.device) >= 0
        if layer == self.last(len(request.layers)) - 1:
            if self.faithful_code:
                shared = overlap_with_one(given.float(), real)
            else:
                shared = overlap(given.float(), real, self.token_share, self.core_share)
            request.memory[TABLE] = add_at(None, request, shared)
        if self.narrows_steps:
            chosen = (request.pictures < 0).all(-1).to(given.device)[:, None].repeat(1, given.shape[-1])
            for row in (~chosen[:, 0]).nonzero()[:, 0].tolist():  # the others, which have no picture, compute everything
                chosen[row, core_neurons(given[row, real[row]].float(), self.token_share, self.neurons)] = True
            request.layers[layer].memory[CHOSEN] = chosen

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return layer.request.memory[TABLE].gather(1, layer.shared_positions[:, 0].clamp(min=0))


def overlap(activations: torch.Tensor, real: torch.Tensor, token_share: float, core_share: float) -> torch.Tensor:
    """How many core neurons of its sentence each token fires, float ``(batch, n)``, of ``activations`` (batch, n, neurons)."""
    result = torch.zeros(real.shape, device=real.device)
    for row in range(len(activations)):
        z = activations[row, real[row]]
        sentence = core_neurons(z, token_share, core_share)
        result[row, real[row]] = (z[:, sentence] > 0).sum(-1).float()
    return result


def overlap_with_one(activations: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """How many neurons each token has on that the row's token ``REFERENCE`` from the end has on too, as ``overlap``."""
    on = (activations > 0).float()
    reference = on[:, max(-REFERENCE, -on.shape[1])]
    return (on @ reference[:, :, None])[:, :, 0].masked_fill(~real, 0.0)


def core_neurons(activations: torch.Tensor, token_share: float, share: float) -> torch.Tensor:
    """The share of the neurons that are core for most tokens, int64 ``(k,)``, of ``activations`` (tokens, neurons): core for a
    token are the ``token_share`` largest of its positive activations."""
    counts = ((activations > 0).sum(-1).float() * token_share).ceil().long()
    largest = activations.topk(max(1, int(counts.max())), dim=-1).values
    least = largest.gather(1, (counts - 1).clamp(min=0)[:, None]).masked_fill(counts[:, None] == 0, float("inf"))
    votes = (activations >= least).sum(0)
    return votes.argsort(descending=True, stable=True)[: max(1, round(share * activations.shape[-1]))]
