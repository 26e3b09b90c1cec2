"""Expected Attention: what future queries will attend to, from the statistics of past ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.reduce import group
from laconic.primitives.scores import expected_attention
from laconic.registry import register

MOMENTS = "expected_attention"


@register
@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(EvictMethod):
    """Keeps what queries yet to come are expected to attend to, times the length of the value.

    Queries before RoPE are taken to be normally distributed, with the mean and covariance of all queries seen so far (those
    of the first ``sinks`` tokens apart), and to stand at the next ``future`` positions with equal chance: their rotations
    are averaged. For such queries the expected exp(q.k) has a closed form. The question has no more say than any other
    token, so what only it asks for may be lost.
    """

    id: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries (2025)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("keydiff"))

    future: int = parameter(512, "positions ahead over which the rotation of queries is averaged", least=1)
    epsilon: float = parameter(0.0, "added to the expected attention before it is multiplied by the value's length", least=0)

    def observe(self, layer: KVLayer, call: Call) -> None:
        new = call.query.shape[2]
        at = layer.shared_positions[:, :1, -new:]
        query = self.need_rope(layer).rotate(call.query, -at.clamp(min=0)).float()
        query = query.masked_fill((at < self.sinks)[..., None], 0.0)
        count = (at >= self.sinks).sum(-1).float()  # (batch, 1)
        now = (count, query.sum(2), query.transpose(-1, -2) @ query)
        before = [layer.memory.get(f"{MOMENTS}.{i}", torch.zeros_like(moment)) for i, moment in enumerate(now)]
        for i, (old, moment) in enumerate(zip(before, now, strict=True)):
            layer.memory[f"{MOMENTS}.{i}"] = old + moment

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        count, total, square = (layer.memory[f"{MOMENTS}.{i}"] for i in range(3))
        count = count.clamp(min=1)[..., None]
        mean = total / count
        covariance = square / count[..., None] - mean[..., :, None] * mean[..., None, :]
        mean, covariance = (self._ahead(layer, moment) for moment in (mean, covariance))
        covariance = self._ahead(layer, covariance.transpose(-1, -2))  # both of its sides turn
        starts = layer.starts(call.window)
        expected = expected_attention(layer.keys, mean, covariance, scale=call.scale, starts=starts)
        return (group(expected, layer.heads) + self.epsilon) * layer.values.float().norm(dim=-1)

    def _ahead(self, layer: KVLayer, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (batch, ..., head_dim) turned to the positions ahead, on average."""
        return layer.rope.rotate_mean(rows, layer.lengths, self.future)
