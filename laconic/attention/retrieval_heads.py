"""Heads that look far keep everything, the others the first and the newest tokens: what such methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.select import marked
from laconic.profiles import need_file


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(EvictMethod):
    """Base of methods that tell retrieval heads from the others by a profile. A subclass writes ``retrieval``.

    The budget is the mean over all KV heads of the model: what the retrieval heads leave of it is shared evenly by the others,
    as first and newest tokens. Layers with a sliding window are left alone. While an answer is written the retrieval heads grow
    by its tokens and the others stay as they are.
    """

    needs: ClassVar[str] = "calibration"
    reads_keys: ClassVar[bool] = False
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim("random", budget="25%"), Claim("streaming", budget="25%"), Claim("streaming", budget="25%", question="after"),
    )  # fmt: skip

    profile: str = parameter("", "a file of laconic profile for this method; empty: the one that comes with a built-in model")

    def check(self) -> None:
        need_file(self.id, self.profile)
        self.require(self.budget.shape == "uniform", "the budget is that of all heads together: give it without a shape.")

    def retrieval(self, layer: KVLayer, most: torch.Tensor) -> torch.Tensor:
        """Which heads of the model keep everything: boolean ``(batch, layers, kv_heads)``.

        Args:
            most: int64 ``(batch,)``: how many there can be, so that the budget still holds what the others keep at least.
        """
        raise NotImplementedError

    def keep(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if self.budget.is_full or call.window is not None:
            return None
        whole, room = self._shares(layer, call)
        starts = layer.starts()
        starts = torch.zeros_like(whole, dtype=torch.int64) if starts is None else starts
        counts = (layer.n - starts - room[:, None]).clamp(min=0).masked_fill(whole, 0)
        if not bool(counts.any()):
            return None
        first = starts + self.sinks
        self.forget(layer, first, counts)
        if self.drops_in_place(layer, call):
            layer.forget_after(self.sinks, counts)
            return None
        slot = torch.arange(layer.n, device=first.device)
        dropped = (slot >= first[..., None]) & (slot < (first + counts)[..., None])
        return marked(~dropped & (slot >= starts[..., None]))

    def forget(self, layer: KVLayer, first: torch.Tensor, counts: torch.Tensor) -> None:
        """Called before ``counts`` (batch, kv_heads) entries from slot ``first`` (batch, kv_heads) on are evicted."""

    def _shares(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Which heads of this layer keep everything, (batch, kv_heads), and how many tokens the others keep, (batch,).

        They are settled with the prompt, and after a crop.
        """
        memory, names = layer.memory, (f"{self.id}.whole", f"{self.id}.room")
        if not call.decoding or names[0] not in memory:
            memory[names[0]], memory[names[1]] = self._settle(layer)
        return memory[names[0]], memory[names[1]]

    def _settle(self, layer: KVLayer) -> tuple[torch.Tensor, torch.Tensor]:
        prompt, least = layer.memory["prompt"], self.sinks + self.recent
        heads = layer.layers * layer.heads
        total = heads * torch.tensor([self.budget.tokens(n) for n in prompt.tolist()], device=prompt.device)
        if self.budget.amount is not None:  # also of a prompt that is shorter than the budget
            total = torch.full_like(prompt, heads * self.budget.amount)
        most = ((total - heads * least) // (prompt - least).clamp(min=1)).clamp(0, heads)
        whole = self.retrieval(layer, most)
        count = whole.flatten(1).sum(-1)
        room = torch.where(count < heads, (total - count * prompt) // (heads - count).clamp(min=1), prompt)
        short = (room < least) & (prompt > room)
        if bool(short.any()):
            row = int(short.nonzero()[0])
            self.require(
                False,
                f"a budget of {int(total[row]) // heads} tokens cannot hold {int(count[row])} of {heads} heads at full length "
                f"and {least} tokens of each other: give a larger budget, or fewer retrieval heads.",
            )
        return whole[:, layer.index], room


def ranked(scores: list[list[float]]) -> torch.Tensor:
    """The place of every head of the model by its score, int64 ``(layers, kv_heads)``: 0 is the best, ties to the lowest."""
    table = torch.tensor(scores)
    return table.flatten().argsort(descending=True, stable=True).argsort().view_as(table)


def calibrated(layers: list[torch.Tensor]) -> list[list[float]]:
    """One number per KV head of each layer, as a profile holds them."""
    return [[round(float(v), 5) for v in scores] for scores in layers]
