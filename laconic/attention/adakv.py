"""Ada-KV: heads of a layer share their budget by what their entries are worth."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.errors import LaconicError, quote
from laconic.method import parameter
from laconic.primitives.select import keep_top_of_all_heads
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class AdaKV(EvictMethod):
    """Gives the KV heads of a layer unequal budgets: the best entries of all heads together stay, by another method's scores.

    Heads that spread their attention get more than those that look at few tokens; each keeps at least ``floor`` of its even
    share. The total is that of the budget. The other method is named first, ``adakv(snapkv(window=64)):10%``, and decides what
    is protected and when. Scores should mean the same in every head, as probabilities do. Each head is stored in its own
    length.
    """

    id: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("snapkv"), Claim("snapkv", "kl"))

    of: str = parameter("snapkv", "the evicting method whose scores are shared, with its parameters")
    floor: float = parameter(0.2, "share of the even budget that every head keeps in any case", least=0)
    sinks: int = parameter(0, "first tokens that are always kept, besides those that the other method protects", least=0)
    recent: int = parameter(0, "newest tokens that are always kept, besides those that the other method protects", least=0)

    def check(self) -> None:
        self.require(self.floor <= 1, "floor is a share: give a number up to 1.")
        inner = self.inner
        scores = isinstance(inner, EvictMethod) and type(inner).score is not EvictMethod.score
        self.require(scores and not isinstance(inner, AdaKV), f"{inner.id} has no scores of entries to share the budget by.")

    @functools.cached_property
    def inner(self) -> EvictMethod:
        """The method whose scores are used, at this budget."""
        from laconic.recipe import Recipe

        try:
            methods = Recipe.parse(self.of).methods
        except LaconicError as error:
            raise LaconicError(f"{self.id}: of={quote(self.of)} is no method: {error}") from None
        self.require(
            len(methods) == 1 and methods[0].budget.is_full, "of names one method, without a budget: adakv(snapkv):10%."
        )
        return dataclasses.replace(methods[0], budget=self.budget) if isinstance(methods[0], EvictMethod) else methods[0]

    @property
    def reads_keys(self) -> bool:  # type: ignore[override]
        return self.inner.reads_keys

    @property
    def watches(self) -> bool:
        return self.inner.watches

    def evicts(self, call: Call) -> bool:
        return super().evicts(call) and self.inner.evicts(call)

    def quota(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return self.inner.quota(layer, call)

    def observe(self, layer: KVLayer, call: Call) -> None:
        self.inner.observe(layer, call)

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return self.inner.score(layer, call)

    def keep(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if self.covers(layer, call):
            return None
        quota = self.quota(layer, call)
        sinks, recent = self.inner.protected(quota)
        sinks, recent = max(sinks, self.sinks), torch.as_tensor(recent, device=quota.device).clamp(min=self.recent)
        starts = layer.starts(call.window)
        return keep_top_of_all_heads(self.score(layer, call), quota, starts, sinks, recent, self.floor, self.id)
