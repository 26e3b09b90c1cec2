"""SnapKV: the last window of the prompt says which of its tokens matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.reduce import pool
from laconic.primitives.scores import attention_received
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class SnapKV(EvictMethod):
    """Keeps what the last ``window`` tokens of the prompt attend to, smoothed over neighbours, and the window itself.

    Whatever the window does not ask
    for is gone, so a second question about the same text, or a chain of facts, suffers.
    """

    id: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("tova"))

    sinks: int = parameter(0, "first tokens that are always kept", least=0)
    recent: int = parameter(0, "newest tokens that are always kept, on top of the window", least=0)
    once: bool = parameter(True, "cut prompts only, as published; what is generated afterwards all stays", search=())
    window: int = parameter(32, "last tokens of the prompt whose attention is the score; always kept", least=1)
    kernel: int = parameter(7, "width of the average pooling over positions, odd; 1 switches it off", least=1)

    def check(self) -> None:
        self.require(self.kernel % 2 == 1, f"kernel={self.kernel} is even, which would shift positions: use an odd one.")

    def protected(self, quota: torch.Tensor) -> tuple[int, int]:
        return self.sinks, max(self.window, self.recent)

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        received = attention_received(
            call.query[:, :, -self.window :],
            layer.keys,
            scale=call.scale,
            softcap=call.softcap,
            starts=layer.starts(),
            window=call.window,
        )
        return pool(received, self.kernel, starts=layer.starts(call.window))
