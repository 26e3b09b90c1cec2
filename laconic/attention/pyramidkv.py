"""PyramidKV: SnapKV's choice, with most of the budget in the first layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call
from laconic.attention.snapkv import SnapKV
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Keeps what SnapKV keeps, but many tokens in the first layers and few in the last.

    Early layers spread their attention, late ones put it on few tokens. Beyond the window, which every layer keeps, the last
    layer gets 1 / ``beta`` of the mean, the first what makes the mean right, and the layers between lie on a line: over all
    layers the budget is kept exactly, except where the first layers have no more tokens to keep.
    """

    id: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("snapkv"))

    beta: float = parameter(20.0, "mean budget over the last layer's, beyond the window; 1 gives every layer the same", least=1)

    def check(self) -> None:
        super().check()
        self.require(self.budget.shape == "uniform", "it has its own pyramid: give the budget without 'pyramid:'.")

    def quota(self, layer: KVLayer, call: Call) -> torch.Tensor:
        mean, visible = super().quota(layer, call), layer.lengths
        if layer.layers == 1 or self.budget.is_full:
            return mean
        quotas = [self.share(int(m), int(n), layer.index, layer.layers) for m, n in zip(mean, visible, strict=True)]
        return torch.tensor(quotas, device=mean.device).clamp(max=layer.n)

    def share(self, mean: int, visible: int, layer: int, layers: int) -> int:
        """Tokens of ``layer`` where the mean over ``layers`` is ``mean`` and ``visible`` tokens are there."""
        everywhere = self.sinks + max(self.window, self.recent)
        inner, room = mean - everywhere, visible - everywhere
        if inner <= 0:
            return mean
        last = inner / self.beta
        first = 2 * inner - last
        if first > room:
            first, last = room, 2 * inner - room
        before, after = (first * i - (first - last) * i * (i - 1) / 2 / (layers - 1) for i in (layer, layer + 1))
        return everywhere + math.floor(after + 0.5) - math.floor(before + 0.5)  # sums are rounded: nothing is lost
