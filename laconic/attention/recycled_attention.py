"""Recycled Attention: what one full step attended to serves the steps that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, ReadMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.reduce import pool
from laconic.primitives.scores import attention_received
from laconic.primitives.select import hide
from laconic.registry import register
from laconic.selection import Selection


@register
@dataclass(frozen=True, kw_only=True)
class RecycledAttention(ReadMethod):
    """Attends fully now and then; in between, reads the tokens that the last full step attended to most.

    A full step ranks all entries per KV head by its attention (largest over the heads of the group, max-pooled over
    neighbours) and keeps the best in a queue, lowest in front. A partial step appends the new token to the queue and drops
    its front. Every ``every`` steps the query is compared with that of the last full step: when their cosine is below
    ``similarity`` the step is full. ``similarity`` above 1 makes every such step full, which is the fixed schedule of the
    first version of the paper. Memory does not shrink.
    """

    id: ClassVar[str] = "recycled_attention"
    paper: ClassVar[str] = "Recycled Attention (2024), later RefreshKV (2025)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("quest"), Claim("dense", "bytes_read", by=8))

    sinks: int = parameter(0, "first tokens that are always read", least=0)
    recent: int = parameter(0, "newest tokens that are always read", least=0)
    every: int = parameter(5, "decode steps between two looks at the query", least=1)
    similarity: float = parameter(0.85, "a looked-at step is full when its query's cosine to the last full step is below this")
    kernel: int = parameter(7, "width of the max pooling over positions, odd; 1 switches it off", least=1)

    def check(self) -> None:
        self.require(self.kernel % 2 == 1, f"kernel={self.kernel} is even, which would shift positions: use an odd one.")

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        memory = layer.memory
        memory["recycled.step"] = memory.get("recycled.step", 0) + 1
        queue = layer.slots.get(self.id)
        if queue is None or self.covers(layer, call):
            layer.slots.pop(self.id, None)
            return None
        queue = layer.slots[self.id] = _push(queue, layer.n - 1, self.quota(layer, call), self.sinks)
        full = self._full_rows(layer, call) | self.covered(layer, call)
        memory["recycled.full"] = full
        if bool(full.all()):
            return None
        starts = layer.starts(call.window)
        slots = hide(queue, starts).sort(dim=-1).values
        if bool(full.any()):  # rows of a batch decide for themselves: a full row reads every slot that it can see
            everything = hide(torch.arange(layer.n, device=slots.device).expand(*slots.shape[:2], -1), starts)
            padded = torch.nn.functional.pad(slots, (layer.n - slots.shape[-1], 0), value=-1)
            slots = torch.where(full[:, None, None], everything, padded)
        return Selection(slots)

    def observe(self, layer: KVLayer, call: Call) -> int | None:
        """After a full step the queue is made anew from the newest query."""
        memory = layer.memory
        if not call.decoding:
            memory["recycled.step"] = 0
            layer.slots.pop(self.id, None)
        queue, full = layer.slots.get(self.id), memory.get("recycled.full")
        if queue is not None and not bool(full.any()):
            return None
        fresh, query = self._rank(layer, call), call.last.mean(1)
        if queue is None:
            memory["recycled.full"] = torch.ones(fresh.shape[0], dtype=torch.bool, device=fresh.device)
        else:
            fresh = torch.where(full[:, None, None], fresh, queue)
            query = torch.where(full[:, None], query, memory["recycled.query"])
        layer.slots[self.id], memory["recycled.query"] = fresh, query
        return layer.keys.numel() * layer.keys.element_size()

    def _full_rows(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Boolean ``(batch,)``: which rows make this a full step."""
        query, last = call.last.mean(1), layer.memory["recycled.query"]
        if layer.memory["recycled.step"] % self.every:
            return torch.zeros(query.shape[0], dtype=torch.bool, device=query.device)
        return torch.nn.functional.cosine_similarity(query, last, dim=-1) < self.similarity

    def _rank(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Slots of the best entries per KV head, ``(batch, kv_heads, quota)``: -1 where a row has fewer, the sinks, then the
        others from the lowest score up and the recent ones."""
        starts = layer.starts(call.window)
        received = attention_received(
            call.query[:, :, -1:], layer.keys, scale=call.scale, softcap=call.softcap, starts=starts, reduce="max"
        )
        received = pool(received, self.kernel, "max")
        slots = self.choose(layer, call, received, sinks=self.sinks, recent=self.recent)
        first = 0 if starts is None else starts[..., None]
        worth = received.gather(-1, slots.clamp(min=0))
        worth = worth.masked_fill(slots < first + self.sinks, -1.0).masked_fill(slots >= layer.n - self.recent, float("inf"))
        return slots.gather(-1, worth.masked_fill(slots < 0, -2.0).argsort(dim=-1, stable=True))


def _push(queue: torch.Tensor, slot: int, quota: torch.Tensor, sinks: int) -> torch.Tensor:
    """Appends ``slot``; a row that then holds more than its quota drops its lowest entry, another uses up an empty slot."""
    empty = (queue < 0).sum(-1, keepdim=True)
    held = queue.shape[-1] - empty
    dropped = torch.where(held + 1 > quota[:, None, None], empty + sinks, 0)
    index = torch.arange(queue.shape[-1] - 1, device=queue.device).expand(*queue.shape[:2], -1)
    kept = queue.gather(-1, index + (index >= dropped))
    return torch.cat([kept, torch.full_like(kept[..., :1], slot)], dim=-1)
