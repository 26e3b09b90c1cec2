"""Ada-KV: heads of a layer share their budget by what their entries are worth."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod, ReadMethod
from laconic.attention.search import search
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.errors import LaconicError, quote
from laconic.method import parameter
from laconic.primitives.select import keep_top_of_all_heads
from laconic.registry import register
from laconic.selection import Selection


@register
@dataclass(frozen=True, kw_only=True)
class AdaKV(EvictMethod):
    """Gives the KV heads of a layer unequal budgets: the best entries of all heads together, by another method's scores.

    Heads that spread their attention get more than those that look at few tokens; each gets at least ``floor`` of its even
    share. The total is that of the budget. The other method is named first and decides what is protected and when:
    ``adakv(snapkv(window=64)):10%`` evicts, and each head is stored in its own length; ``adakv(hisa):10%`` reads, and each head
    reads its own number of tokens (of a method that searches by scores: quest, hisa, fasa, tokenselect, coarse_to_fine). Scores
    should mean the same in every head, as probabilities do.
    """

    id: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("snapkv"), Claim("snapkv", "kl"))

    verbs: ClassVar[tuple[str, ...]] = ("evict", "read")
    reads_chunks: ClassVar[bool] = False

    of: str = parameter("snapkv", "the method whose scores are shared, with its parameters")
    floor: float = parameter(0.2, "share of the even budget that every head keeps in any case", least=0)
    sinks: int = parameter(0, "first tokens that are always kept, besides those that the other method protects", least=0)
    recent: int = parameter(0, "newest tokens that are always kept, besides those that the other method protects", least=0)

    def check(self) -> None:
        self.require(self.floor <= 1, "floor is a share: give a number up to 1.")
        inner = self.inner
        scores = isinstance(inner, EvictMethod) and type(inner).score is not EvictMethod.score
        scores = scores or (isinstance(inner, ReadMethod) and bool(inner.chain))
        self.require(scores and not isinstance(inner, AdaKV), f"{inner.id} has no scores of entries to share the budget by.")

    @functools.cached_property
    def inner(self) -> EvictMethod | ReadMethod:
        """The method whose scores are used, at this budget."""
        from laconic.recipe import Recipe

        try:
            methods = Recipe.parse(self.of).methods
        except LaconicError as error:
            raise LaconicError(f"{self.id}: of={quote(self.of)} is no method: {error}") from None
        self.require(
            len(methods) == 1 and methods[0].budget.is_full, "of names one method, without a budget: adakv(snapkv):10%."
        )
        inner = methods[0]
        if isinstance(inner, ReadMethod):
            ends = {"sinks": max(inner.sinks, self.sinks), "recent": max(inner.recent, self.recent)}
            return dataclasses.replace(inner, budget=self.budget, **ends)
        return dataclasses.replace(inner, budget=self.budget) if isinstance(inner, EvictMethod) else inner

    @property
    def reads(self) -> bool:
        return self.inner.reads

    @property
    def reads_keys(self) -> bool:  # type: ignore[override]
        return self.inner.reads_keys

    @property
    def compacts(self) -> bool:
        return isinstance(self.inner, EvictMethod) and self.inner.compacts

    @property
    def watches(self) -> bool:
        return self.inner.watches

    def evicts(self, call: Call) -> bool:
        return super().evicts(call) and self.inner.evicts(call)

    def quota(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return self.inner.quota(layer, call)

    def observe(self, layer: KVLayer, call: Call) -> int | None:
        return self.inner.observe(layer, call)

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        """As a reader's: what this step reads."""
        return search(self.inner, layer, call, self.inner.chain, floor=self.floor)

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
