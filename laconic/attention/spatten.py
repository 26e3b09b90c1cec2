"""SpAtten: on the way up through the layers, tokens that drew little attention so far are left behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic import kernels
from laconic.attention.base import Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.select import keep_top
from laconic.registry import register

SCORES, ALIVE = "spatten.scores", "spatten.alive"


@register
@dataclass(frozen=True, kw_only=True)
class SpAtten(EvictMethod):
    """Drops tokens layer by layer: what layer l forgets is computed and held by no deeper layer.

    The worth of a token is all attention that it drew so far, summed over heads, layers, and the rows of the prompt and of
    every step; tokens that are gone give and draw nothing. After each layer the best of the living stay, so that the sets
    lie inside each other, and the prompt's rows of the others leave: deeper layers save their projections, attention and
    feed-forward, not only their cache. The budget is the mean over depth. The first layers keep everything as long as the
    others keep at least half of the mean; from there on a line falls to the last layer. In a step every layer goes on
    forgetting down to its share.

    A forgotten token's output is its hidden state from where it left, which only matters to who reads logits of the prompt.
    Like H2O it loses facts that nothing attended to before they are asked for, and shallow layers decide for all.
    """

    id: ClassVar[str] = "spatten"
    paper: ClassVar[str] = "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning (2021)"
    claims: ClassVar[tuple[Claim, ...]] = (Claim("random", budget="50%"), Claim("streaming", budget="50%"))
    shortens: ClassVar[bool] = True

    recent: int = parameter(16, "newest tokens that are always kept; the last one always stays", least=1)
    warm: float = parameter(0.15, "share of the layers, from the first on, that keep all tokens where the budget allows", least=0)
    slope: float = parameter(0.5, "the other layers fall from 1 + slope times their mean to 1 - slope times", least=0)

    def check(self) -> None:
        self.require(self.warm <= 1, "warm is a share of the layers: give at most 1.")
        self.require(self.slope < 1, "slope=1 or more leaves the last layer without tokens: give less.")
        self.require(self.budget.shape == "uniform", "it spreads the budget over the layers itself: leave out 'pyramid:'.")

    def quota(self, layer: KVLayer, call: Call) -> torch.Tensor:
        visible = layer.lengths
        base = visible if self.budget.share is None else layer.memory["prompt"]
        quota = [self.tokens(n, layer.index, layer.layers) for n in base.tolist()]
        return torch.minimum(torch.tensor(quota, device=visible.device), visible).clamp(max=layer.n)

    def tokens(self, n: int, layer: int, layers: int) -> int:
        """Tokens out of ``n`` that stay in ``layer``, counted from 0, of ``layers``."""
        if n == 0:
            return 0
        mean = self.budget.share or min(1.0, self.budget.amount / n)
        return max(1, math.floor(schedule(mean, layers, self.warm, self.slope)[layer] * n + 1e-9))

    def observe(self, layer: KVLayer, call: Call) -> None:
        """Adds what every entry receives in this layer to the scores of its token."""
        if self.budget.is_full:
            return
        memory, positions = layer.request.memory, layer.shared_positions
        length = int(layer.lengths.max())
        if layer.index == 0:
            memory[ALIVE] = positions.new_ones(positions.shape[0], max(length, 1), dtype=torch.bool)
        received = _received(layer, call).unflatten(1, (positions.shape[1], -1)).sum(2)
        scores = memory.get(SCORES)
        known = 0 if scores is None else scores.shape[1]
        if known < length:
            fresh = received.new_zeros(positions.shape[0], length + 64 - known)
            memory[SCORES] = scores = fresh if scores is None else torch.cat([scores, fresh], 1)
        scores.scatter_add_(1, positions.clamp(min=0).flatten(1), received.flatten(1))

    def keep(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        """The best of the living; they alone go on. What has left a sliding window does not compete, and does not die."""
        if self.budget.is_full:
            return None
        memory, quota, coming = layer.request.memory, self.quota(layer, call), _coming(layer, call)
        positions, alive = layer.shared_positions, memory[ALIVE]
        at, starts = positions.clamp(min=0), _starts(layer, call, coming)
        living = (positions >= 0) & _pick(alive, at)
        if torch.equal(living, positions >= 0) and bool((living.sum(-1) <= quota[:, None]).all()):
            return None
        if starts is not None:
            living &= torch.arange(layer.n, device=at.device) >= starts[:, : at.shape[1], None]
        worth = _pick(memory[SCORES], at).masked_fill(~living, float("-inf"))
        slots = keep_top(worth, quota, starts, self.sinks, self.recent, self.id)
        dead = (slots < 0) | ~living.gather(2, slots.clamp(min=0))
        slots = slots.masked_fill(dead, -1).sort(dim=-1).values
        slots = slots[..., min(int((slots < 0).sum(-1).min()), slots.shape[-1] - 1) :]
        stays = torch.zeros_like(living, dtype=torch.int8).scatter_add_(2, slots.clamp(min=0), (slots >= 0).to(torch.int8)) > 0
        memory[ALIVE] = alive & (_any(stays, at, alive) | ~_any(living, at, alive))
        if not call.decoding:
            gone = (coming < 0) | ~memory[ALIVE].gather(1, coming.clamp(min=0))
            layer.request.onward = coming.masked_fill(gone, -1).sort(dim=-1).values
        return slots


def schedule(mean: float, layers: int, warm: float, slope: float) -> list[float]:
    """Shares of tokens that stay per layer, never rising, with the given ``mean``.

    Up to ``warm`` of the layers, rounded, keep all, as many as leave the others half of the mean. These fall on a line from
    (1 + slope) to (1 - slope) times their own mean, or less steeply where it would start above 1.
    """
    if mean >= 1:
        return [1.0] * layers
    first = min(round(warm * layers), layers - 1)
    while first and mean * layers - first < mean / 2 * (layers - first):
        first -= 1
    rest = layers - first
    average = (mean * layers - first) / rest
    slope = min(slope, 1 / average - 1)
    line = [average * (1 + slope * (1 - 2 * i / (rest - 1))) for i in range(rest)] if rest > 1 else [average]
    return [1.0] * first + line


def _coming(layer: KVLayer, call: Call) -> torch.Tensor:
    """Positions ``(batch, new)`` of the rows of this call."""
    batch, _, new, _ = call.query.shape
    return layer.request.take(batch, new, layer.seen - new, call.query.device)


def _starts(layer: KVLayer, call: Call, coming: torch.Tensor) -> torch.Tensor | None:
    """First slot ``(batch, kv_heads)`` that any row of this call sees; None when all slots are seen."""
    if call.window is None:
        return layer.starts()
    first = coming.masked_fill(coming < 0, coming.max()).amin(-1)  # of the real ones, which ascend
    hidden = layer.shared_positions < (first - call.window + 1).clamp(min=0)[:, None, None]
    return hidden.sum(-1).expand(-1, layer.heads)


def _received(layer: KVLayer, call: Call) -> torch.Tensor:
    """Attention probability that each entry receives in this call, ``(batch, heads, n)``; empty slots receive 0."""
    options = {"scale": call.scale, "softcap": call.softcap}
    if call.decoding:
        return kernels.column_sums(call.query, layer.keys, starts=layer.starts(call.window), **options)
    starts, pads = layer.starts(), (_coming(layer, call) < 0).sum(-1).tolist()
    options |= {"window": call.window, "positions": layer.shared_positions}
    if not any(pads):
        return kernels.column_sums(call.query, layer.keys, starts=starts, **options)
    received = call.query.new_zeros(*call.query.shape[:2], layer.n, dtype=torch.float32)
    for row, pad in enumerate(pads):  # rows of padding give nothing
        one = slice(row, row + 1)
        if pad < call.query.shape[2]:
            options["positions"] = layer.shared_positions[one]
            received[one] = kernels.column_sums(call.query[one, :, pad:], layer.keys[one], starts=starts[one], **options)
    return received


def _pick(table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Values of ``table`` (batch, positions) at the positions ``at`` (batch, heads, n)."""
    return table.gather(1, at.flatten(1)).view(at.shape)


def _any(flags: torch.Tensor, at: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Boolean as ``like`` (batch, positions): the positions ``at`` (batch, heads, n) of which any of ``flags`` is set."""
    counts = torch.zeros_like(like, dtype=torch.int32)
    return counts.scatter_add_(1, at.flatten(1), flags.flatten(1).to(torch.int32)) > 0
