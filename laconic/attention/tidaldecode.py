"""TidalDecode: a few layers choose, all deeper layers read the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic import kernels
from laconic.attention.base import AttentionMethod, Call, ReadMethod
from laconic.buffers import take
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.select import hide, keep_top
from laconic.registry import register
from laconic.selection import Selection

START, RESELECT = 2 / 32, 13 / 32  # of the depth: layers 2 and 13 of the 32 of the source's models


@register
@dataclass(frozen=True, kw_only=True)
class TidalDecode(ReadMethod):
    """In each step two layers attend to everything and choose the best tokens, which the layers after them read.

    Neighbouring layers look at much the same tokens, so a choice made early holds for a while, and one more in the middle
    corrects it. Layers before ``start`` read everything. The tokens are those that the heads jointly vote for (softmax per
    head, summed), or with ``per_head`` a set for each KV head, handed on to the head of the same number. Prompts are prefilled
    densely; layers with a sliding window read their window. Nothing is forgotten.
    """

    id: ClassVar[str] = "tidaldecode"
    paper: ClassVar[str] = "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("quest"))
    branches: ClassVar[bool] = False

    sinks: int = parameter(0, "first tokens that are always read", least=0)
    recent: int = parameter(1, "newest tokens that are always read", least=1)
    start: int = parameter(-1, "first layer that chooses; -1: a sixteenth of the depth", least=-1)
    reselect: int = parameter(-1, "layer that chooses anew; -1: at 40 % of the depth; 0: none does", least=-1)
    per_head: bool = parameter(False, "let every KV head choose its own set instead of one set for all")

    def chooses(self, index: int, layers: int) -> bool:
        """Whether layer ``index`` of ``layers`` attends to everything and makes a choice."""
        start = round(START * layers) if self.start < 0 else self.start
        again = round(RESELECT * layers) if self.reselect < 0 else self.reselect
        return index == start or (index == again and start < again < layers - 1)

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        if self.covers(layer, call) or self.chooses(layer.index, layer.layers):
            return None
        memory = layer.request.memory
        if call.window is not None or memory.get(f"{self.id}.step") != layer.seen:
            return None  # layers before the first choice of this step
        slots = layer.slots_of(memory[self.id])
        return Selection(hide(slots, layer.starts(call.window)))

    def observe(self, layer: KVLayer, call: Call) -> int | None:
        memory = layer.request.memory
        if not call.decoding or call.window is not None or not self.chooses(layer.index, layer.layers):
            return None
        starts = layer.starts()
        votes = kernels.vote(
            call.last, layer.keys, scale=call.scale, starts=starts, over="group" if self.per_head else "layer",
            softcap=call.softcap,
        )  # fmt: skip
        slots = keep_top(votes, self.quota(layer, call), starts, self.sinks, self.recent, self.id)
        chosen = take(layer.shared_positions, slots)
        memory[self.id] = torch.where(slots < 0, -1, chosen)
        memory[f"{self.id}.step"] = layer.seen
        return layer.keys.numel() * layer.keys.element_size()
