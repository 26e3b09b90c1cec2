"""TOVA: whatever the newest token attends to least is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.scores import attention_received
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Tova(EvictMethod):
    """Keeps what the newest query attends to most; nothing is protected but the newest token itself.

    The probability of the last query row, mean over all query heads of the layer (``per_head=False``, as published) or
    over the heads of each KV group. After the prompt it cuts once to the budget, then it drops one entry a step.
    """

    id: ClassVar[str] = "tova"
    paper: ClassVar[str] = "Transformers are Multi-State RNNs (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("h2o"))

    sinks: int = parameter(0, "first tokens that are always kept", least=0)
    recent: int = parameter(1, "newest tokens that are always kept", least=0)
    per_head: bool = parameter(False, "let every KV head keep its own set instead of one set per layer")

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        received = attention_received(
            call.query[:, :, -1:], layer.keys, scale=call.scale, softcap=call.softcap, starts=layer.starts(call.window)
        )
        return received if self.per_head else received.mean(1, keepdim=True).expand_as(received)
