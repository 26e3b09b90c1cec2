"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call, RenumberMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.select import check_room
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Streaming(RenumberMethod):
    """Keeps ``sinks`` first tokens and, for the rest of the budget, the newest.

    The first tokens stay because attention parks its mass there when it has nothing to say. The original renumbers what
    stays (``positions=compact``), which matters past the trained length.
    """

    id: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks (2023)"
    claims: ClassVar[tuple[Claim, ...]] = (Claim("random"),)
    reads_keys: ClassVar[bool] = False

    recent: int = parameter(1, "newest tokens that are kept before the budget is looked at", least=0)

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return layer.positions.float()

    def keep(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if not self.drops_in_place(layer, call):
            return super().keep(layer, call)
        if self.covers(layer, call):
            return None
        starts, quota = layer.starts(), self.quota(layer, call)
        held = torch.full_like(quota, layer.n)[:, None] if starts is None else layer.n - starts
        counts = (held - quota[:, None]).clamp(min=0).expand(-1, layer.heads)
        if bool(counts.any()):
            check_room(quota, held.amin(-1), self.sinks, torch.tensor(self.recent), self.id)
            layer.forget_after(self.sinks, counts)  # a step moves the first tokens, not the newest
        return None
