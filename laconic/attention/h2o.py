"""H2O: heavy hitters of accumulated attention, and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, RenumberMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.reduce import GROUP
from laconic.primitives.scores import attention_received
from laconic.registry import register

TRACK = "h2o"


@register
@dataclass(frozen=True, kw_only=True)
class H2O(RenumberMethod):
    """Keeps the tokens that received the most attention so far, and the newest; the budget is split between the two.

    The score of an entry is the sum of the probabilities that it received from every query since it was written, each
    softmax over the cache of its step. Early tokens were seen by more queries, so plain sums favour them; with
    ``normalise`` the sum is divided by the number of queries that could see the entry. A fact that nothing attended to
    before it is asked for is lost: that is the known weakness of the score.

    Variants in use: the original evicts in every step (the default) or, streaming, renumbers what stays
    (``positions=compact``); as a cut of the prompt it is ``once=true``, with ``normalise`` for the mean over queries.
    """

    id: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs (2023)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("tova"))

    sinks: int = parameter(0, "first tokens that are always kept", least=0)
    recent: int = parameter(1, "newest tokens that are kept at least, whatever recent_share says", least=0)
    recent_share: float = parameter(0.5, "share of the budget that goes to the newest tokens")
    reduce: str = parameter("mean", "query heads to KV heads: mean, max or sum")
    normalise: bool = parameter(False, "divide each sum by the number of queries that could see the entry")

    def check(self) -> None:
        super().check()
        self.require(0 <= self.recent_share <= 1, "recent_share must lie between 0 and 1.")
        self.require(self.reduce in GROUP, f"reduce must be one of {', '.join(GROUP)}.")

    def protected(self, quota: torch.Tensor) -> tuple[int, torch.Tensor]:
        return self.sinks, (quota.double() * self.recent_share).long().clamp(min=self.recent)

    def observe(self, layer: KVLayer, call: Call) -> None:
        new = attention_received(
            call.query,
            layer.keys,
            scale=call.scale,
            softcap=call.softcap,
            starts=layer.starts(call.window) if call.decoding else layer.starts(),
            window=call.window,
            reduce=self.reduce,
        )
        known = layer.tracks[TRACK].n if TRACK in layer.tracks else 0
        total = layer.track(TRACK, torch.zeros_like(new[:, :, known:]))
        total += new

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        total = layer.tracks[TRACK].view()
        if not self.normalise:
            return total
        queries = layer.lengths[:, None, None] - layer.positions
        return total / queries.clamp(min=1)
