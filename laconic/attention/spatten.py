"""SpAtten: on the way up through the layers, tokens that drew little attention so far are left behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic import kernels
from laconic.attention import heads
from laconic.attention.base import Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.select import best, keep_top
from laconic.registry import register

SCORES, ALIVE = "spatten.scores", "spatten.alive"
OUTPUTS, HEADS, STEP = "spatten.outputs", "spatten.heads", "spatten.step"
WARM_HEADS = 0.3  # share of the layers, from the first on, that compute all heads where the mean allows


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

    Three more ways of the paper are off by default. ``heads`` below 1 drops query heads layer by layer in the same manner, by
    the sum of the absolute values of their outputs over the prompt; a dropped head is not computed and gives 0, and a KV head
    that serves no other is not read. A step goes by what the prompt left. With ``theta`` above 0 a step scores on 8-bit keys,
    kept beside the cache, and reads the full keys for heads only whose largest probability is below it. With ``values`` below
    1 every head of a step reads the values of its largest probabilities only.

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

    heads: float = parameter(1.0, "mean share of the query heads that layers compute; the first ones compute all", least=0)
    theta: float = parameter(0.0, "full keys are read where no probability on 8-bit keys reaches this; 0: always", least=0)
    values: float = parameter(1.0, "share of the entries whose values each head reads in a step", least=0)
    renormalise: bool = parameter(False, "let the probabilities of the values that are read sum to 1 again")

    def check(self) -> None:
        for name in ("heads", "values"):
            self.require(0 < getattr(self, name) <= 1, f"{name} is a share: give more than 0 and at most 1.")
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
        received = layer.memory.pop(STEP, None)
        if received is None:
            parts = heads.parts_of(self._chosen(layer, call), layer.heads)
            received = heads.received(layer, call, _coming(layer, call), parts)
        received = received.unflatten(1, (positions.shape[1], -1)).sum(2)
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

    # --- heads, coarse keys and values ---
    @property
    def attends(self) -> bool:
        return self.heads < 1 or self.theta > 0 or self.values < 1

    def attend(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, int] | None:
        chosen = self._chosen(layer, call)
        parts = heads.parts_of(chosen, layer.heads)
        if call.decoding and (self.theta > 0 or self.values < 1):
            weights, read = self._weights(layer, call, chosen)
            output, values_read = self._sum_values(layer, call, weights, parts)
            if not self.budget.is_full:
                layer.memory[STEP] = weights
            return output, read + values_read
        output = heads.attend(layer, call, parts)
        if not call.decoding and self.heads < 1:
            self._drop_heads(layer, call, chosen, output)
        return output, heads.bytes_of(layer, parts, keys=1 if self.budget.is_full else 2)  # once more for the scores

    def _chosen(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Query heads that this layer computes, boolean ``(batch, heads)``."""
        everything = torch.ones(call.query.shape[:2], dtype=torch.bool, device=call.query.device)
        if call.decoding or self.heads == 1:
            return layer.memory.get(HEADS, everything)
        return everything if layer.index == 0 else layer.request.memory.get(HEADS, everything)

    def _drop_heads(self, layer: KVLayer, call: Call, chosen: torch.Tensor, output: torch.Tensor) -> None:
        """Adds up what heads put out, and says which of those of this layer the next one computes."""
        memory = layer.request.memory
        layer.memory[HEADS] = chosen
        real = (_coming(layer, call) >= 0)[:, None, :, None]
        total = memory[OUTPUTS] = memory.get(OUTPUTS, 0) + (output.float().abs() * real).sum((2, 3))
        share = schedule(self.heads, layer.layers, WARM_HEADS, self.slope)[min(layer.index + 1, layer.layers - 1)]
        count = max(1, math.floor(share * chosen.shape[1] + 1e-9))
        strongest = kernels.topk(total.masked_fill(~chosen, float("-inf"))[:, None], min(count, int(chosen.sum(-1).min())))
        memory[HEADS] = torch.zeros_like(chosen).scatter(1, strongest[:, 0], True)

    def _weights(self, layer: KVLayer, call: Call, chosen: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Probabilities ``(batch, heads, n)`` of a step, 0 for heads that are not ``chosen``, and the bytes of keys read."""
        starts = layer.starts(call.window)
        weights = torch.zeros(*call.query.shape[:2], layer.n, device=call.query.device)
        read, unsure = 0, chosen
        if self.theta > 0:
            index, used = layer.key_index(), chosen.unflatten(1, (layer.heads, -1)).any(-1)
            first = torch.zeros_like(used, dtype=torch.int64) if starts is None else starts
            weights = kernels.vote(
                call.last, layer.keys, scale=call.scale, softcap=call.softcap, index=index, over="head",
                starts=first.masked_fill(~used, layer.n),
            ) * chosen[..., None]  # fmt: skip
            read += index.bytes * int(used.sum()) // used.numel()
            unsure = chosen & (weights.amax(-1) < self.theta)
        exact = heads.parts_of(unsure, layer.heads)
        for part in exact:
            part.put(weights, heads.probabilities(layer, call, part, starts))
        return weights, read + heads.bytes_of(layer, exact, values=0)

    def _sum_values(
        self, layer: KVLayer, call: Call, weights: torch.Tensor, parts: list[heads.Part]
    ) -> tuple[torch.Tensor, int]:
        """Output ``(batch, heads, 1, head_dim)`` and the bytes of values read."""
        batch, count, _ = weights.shape
        output = call.query.new_zeros(batch, count, 1, layer.values.shape[-1])
        if self.values == 1:
            for part in parts:
                values = part.of(layer.values)
                grouped = weights[part.rows][:, part.heads].unflatten(1, (values.shape[1], -1))
                part.put(output, (grouped.to(values.dtype) @ values).flatten(1, 2)[:, :, None])
            return output, heads.bytes_of(layer, parts, keys=0)
        starts = layer.starts(call.window)
        visible = layer.n - (torch.zeros(batch, 1, dtype=torch.int64) if starts is None else starts.cpu()).amin(-1)
        kept = (self.values * visible.double() + 1e-9).long().clamp(min=1)
        owner, read = torch.arange(count, device=weights.device) // (count // layer.heads), 0
        for part in parts:
            own = weights[part.rows][:, part.heads]
            slots = best(own, kept[part.rows].to(own.device))
            own = own.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0.0)
            if self.renormalise:
                own = own / own.sum(-1, keepdim=True)
            row = torch.arange(batch, device=weights.device)[part.rows, None, None]
            values = layer.values[row, owner[part.heads][:, None], slots.clamp(min=0)]
            part.put(output, own[:, :, None].to(values.dtype) @ values)
            read += int((slots >= 0).sum()) * values.shape[-1] * values.element_size()
        return output, read


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


def _pick(table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Values of ``table`` (batch, positions) at the positions ``at`` (batch, heads, n)."""
    return table.gather(1, at.flatten(1)).view(at.shape)


def _any(flags: torch.Tensor, at: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Boolean as ``like`` (batch, positions): the positions ``at`` (batch, heads, n) of which any of ``flags`` is set."""
    counts = torch.zeros_like(like, dtype=torch.int32)
    return counts.scatter_add_(1, at.flatten(1), flags.flatten(1).to(torch.int32)) > 0
