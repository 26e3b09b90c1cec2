"""ActQKV: the unusual tokens of a window ask for the blocks that it reads."""

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
from laconic.primitives.reduce import group
from laconic.primitives.select import keep_top
from laconic.registry import register
from laconic.selection import Selection

FORCED = torch.finfo(torch.float32).max  # above every score, below the protected tokens
WINDOWS = 1000  # after so many windows, older ones fade
SAMPLES = 100  # steps over which a layer's entropy is averaged, about


@register
@dataclass(frozen=True, kw_only=True)
class ActQKV(ReadMethod):
    """Reads the blocks nearest to a probe query, in which the tokens of a window weigh as much as they deviate.

    Older tokens lie in blocks of ``block``; a block is represented by the mean of the ``keys`` keys in it that received the
    most attention while they were among the ``recent``. The probe is the mean of the window's queries, each weighted by its
    squared deviation from the running mean of all queries, in units of their variance. Cosines are taken over all heads
    together and at one fixed distance, so that a layer reads one set of blocks. A prompt that comes in pieces
    (``prefill_chunk_size``) is read piece by piece in this way; a step has one query, which is its own probe.

    With ``share`` below 1 the layers' budgets together are cut to it while decoding, and layers whose scores are spread
    more evenly (entropy of their softmax at ``temperature``) get more blocks than others, never more than their budget.
    Memory does not shrink.
    """

    id: ClassVar[str] = "actqkv"
    paper: ClassVar[str] = "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference (2025)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("quest"))
    reads_chunks: ClassVar[bool] = True
    branches: ClassVar[bool] = False

    recent: int = parameter(32, "newest tokens that are always read; the original has 512", least=0)
    block: int = parameter(32, "tokens per block", least=1)
    keys: int = parameter(4, "keys of a block whose mean represents it", least=1)
    share: float = parameter(1.0, "part of the budget that the layers together read while decoding; the original: 0.5", least=0)
    least: int = parameter(6, "blocks that every layer reads, as far as its budget goes", least=0)
    temperature: float = parameter(0.05, "of the softmax whose entropy divides the blocks among the layers", least=1e-6)

    def check(self) -> None:
        self.require(self.share <= 1, f"share={self.share} is more than the budget: give at most 1.")

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        new, known = call.query.shape[2], layer.memory.get(self.id + ".blocks")
        probe = self._probe(layer, call)
        if self.covers(layer, call):
            return None
        quota, done = self.quota(layer, call), self._done(layer, new)
        at = layer.shared_positions.clamp(min=0) // self.block
        worth = torch.zeros(at.shape, device=at.device)
        if known is not None:
            scores = torch.einsum("bkd,bkcd->bc", probe, known)
            if call.decoding and self.share < 1:
                quota = self._cut(layer, scores, done, quota, ~self.covered(layer, call))
            worth = scores[:, None].expand(-1, at.shape[1], -1).gather(-1, at.clamp(max=known.shape[2] - 1))
        if not call.decoding:
            held = layer.lengths.clamp(max=layer.n)
            quota = torch.minimum(quota + new, held)
            if bool((quota == held).all()):
                return None
        worth = worth.masked_fill(at >= done[:, None, None], FORCED)
        slots = keep_top(worth, quota, layer.starts(call.window), self.sinks, max(self.recent, new), self.id)
        return Selection(slots, 0 if known is None else known.numel() * known.element_size())

    def observe(self, layer: KVLayer, call: Call) -> None:
        """Adds up the attention that recent tokens receive, and represents the blocks that are no longer recent."""
        new, name = call.query.shape[2], self.id + ".received"
        fresh = layer.n - (layer.tracks[name].n if name in layer.tracks else 0)
        received = layer.track(name, torch.zeros(*layer.keys.shape[:2], fresh, device=layer.keys.device))
        window = max(self.recent, 1) if call.window is None else min(max(self.recent, 1), call.window)
        begin = max(0, layer.n - new - window + 1)
        starts = layer.starts()
        columns = kernels.column_sums(
            call.query, layer.keys[:, :, begin:], scale=call.scale, softcap=call.softcap, window=window,
            starts=None if starts is None else (starts - begin).clamp(min=0),
        )  # fmt: skip
        received[:, :, begin:] += group(columns, layer.heads, "sum")
        known, done = layer.memory.get(self.id + ".blocks"), self._done(layer, 0)
        have = torch.zeros_like(done) if known is None else self._done(layer, new).clamp(max=known.shape[2])
        if bool((have < done).any()):
            layer.memory[self.id + ".blocks"] = self._represent(layer, received, known, have, done)

    def _done(self, layer: KVLayer, new: int) -> torch.Tensor:
        """Blocks per row, ``(batch,)``, that were complete and not recent before the last ``new`` tokens."""
        return (layer.lengths - new - self.recent).clamp(min=0) // self.block

    def _represent(
        self, layer: KVLayer, received: torch.Tensor, known: torch.Tensor | None, have: torch.Tensor, done: torch.Tensor
    ) -> torch.Tensor:
        """Mean keys ``(batch, kv_heads, blocks, head_dim)``, of length 1 over all heads; have..done-1 of each row are new."""
        begin = max(0, layer.n - int((layer.lengths - have * self.block).max()))
        at = layer.positions[:, :, begin:]
        number = at.clamp(min=0) // self.block
        wanted = (at >= 0) & (number >= have[:, None, None]) & (number < done[:, None, None])
        number = number.masked_fill(~wanted, int(done.max()))  # one place more, for those that are not wanted
        order = received[:, :, begin:].argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, number.gather(-1, order).argsort(dim=-1, stable=True))  # by block, the most attended first
        number, place = number.gather(-1, order), torch.arange(order.shape[-1], device=order.device)
        first = number != number.roll(1, -1)
        first[..., 0] = True
        rank = place - torch.where(first, place, 0).cummax(-1).values
        keys = take(layer.keys[:, :, begin:], order)
        if layer.rope is not None:
            keys = layer.rope.rotate(keys, -at.gather(-1, order).clamp(min=0))
        chosen = (rank < self.keys).float()[..., None]
        number = number[..., None]
        total = keys.new_zeros(*keys.shape[:2], int(done.max()) + 1, keys.shape[-1], dtype=torch.float32)
        count = total[..., :1].scatter_add(2, number, chosen)
        total.scatter_add_(2, number.expand_as(keys), keys.float() * chosen)
        mean = (total / count.clamp(min=1))[:, :, :-1]
        mean = mean / mean.norm(dim=(1, 3), keepdim=True).clamp(min=1e-12)
        if known is None:
            return mean
        blocks = max(known.shape[2], mean.shape[2])
        known, mean = (torch.nn.functional.pad(t, (0, 0, 0, blocks - t.shape[2])) for t in (known, mean))
        return torch.where((torch.arange(blocks, device=mean.device) < have[:, None])[:, None, :, None], known, mean)

    def _probe(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Unit vector of all heads at a fixed distance, added up over the heads of a group: ``(batch, kv_heads, head_dim)``."""
        query, positions = call.query, layer.shared_positions[:, :1, -call.query.shape[2] :]
        if layer.rope is not None:
            query = layer.rope.rotate(query, self.recent - positions.clamp(min=0))
        flat = query.float().transpose(1, 2).flatten(2)  # (batch, new, heads * head_dim)
        if call.decoding:
            probe = flat[:, 0]
        else:
            real = (positions[:, 0] >= 0).float()
            probe = (self._weights(layer, flat, real)[..., None] * flat).sum(1)
        probe = probe / probe.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        grouped = probe.view(probe.shape[0], layer.heads, -1, query.shape[-1])
        return grouped.sum(2) / grouped.shape[2] ** 0.5  # a cosine with the block's vector, repeated for every query head

    def _weights(self, layer: KVLayer, flat: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Weight of each token of a window ``(batch, new)``, after the window is taken into the running statistics."""
        state = layer.memory.get(self.id + ".statistics")
        if state is None:
            state = flat.new_zeros(flat.shape[0], 3, flat.shape[2])
        mean, variance, seen = state[:, 0], state[:, 1], state[:, 2, :1]
        mean, variance, seen = update(mean, variance, seen, flat, real)
        layer.memory[self.id + ".statistics"] = torch.stack([mean, variance, seen.expand_as(mean)], dim=1)
        return activation(flat, real, mean, variance)

    def _cut(
        self, layer: KVLayer, scores: torch.Tensor, done: torch.Tensor, quota: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Quota ``(batch,)`` with this layer's part of the blocks that all layers together may read.

        Only the rows that ``shares`` (batch,) names are cut: one whose budget holds everything has nothing to share out, and
        what is remembered of it stays as it was.
        """
        memory = layer.request.memory
        outside = self.sinks + layer.lengths - done * self.block  # read in any case, next to the blocks
        most = ((quota - outside) // self.block).clamp(min=0)
        spread = entropy(scores / self.temperature, done)
        sums = memory.get(self.id + ".entropy")
        if sums is None:
            sums = memory[self.id + ".entropy"] = spread.new_zeros(len(spread), layer.layers, 2)
        added = sums[:, layer.index] * (1 - 1 / SAMPLES) + torch.stack([spread, torch.ones_like(spread)], dim=-1)
        sums[:, layer.index] = torch.where(shares[:, None], added, sums[:, layer.index])
        means = torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1].clamp(min=1e-9), spread[:, None])  # not seen: as here
        last, left = memory.get(self.id + ".last"), memory.get(self.id + ".left")
        if last is None:
            last, left = torch.full_like(done, layer.layers), torch.zeros_like(spread)
        fresh = self.share * most * (layer.layers - layer.index)  # at the first layer of a step that reads a part
        left = torch.where(layer.index <= last, fresh, left)
        part = left * means[:, layer.index] / means[:, layer.index :].sum(-1).clamp(min=1e-9)
        blocks = torch.minimum(part.round().long().clamp(min=self.least), most)
        memory[self.id + ".left"] = torch.where(shares, left - blocks, left)
        memory[self.id + ".last"] = torch.where(shares, torch.full_like(last, layer.index), last)
        return torch.where(shares, torch.minimum(quota, outside + blocks * self.block), quota)


def update(
    mean: torch.Tensor, variance: torch.Tensor, seen: torch.Tensor, window: torch.Tensor, real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Running mean and unbiased variance ``(batch, d)`` with one more ``window`` (batch, c, d) after ``seen`` (batch, 1).

    ``real`` (batch, c) is 0 for padding; a row of padding only changes nothing. All windows are taken to be of one size.
    """
    size = real.sum(1, keepdim=True)
    some = size.clamp(min=1)
    fresh = (window * real[..., None]).sum(1) / some
    spread = ((window - fresh[:, None]) ** 2 * real[..., None]).sum(1) / some
    first = seen == 0
    denominator = torch.where(first, 1.0, seen + 1 - 1 / some)
    later = (variance * (seen - 1 / some) + spread + (fresh - mean) ** 2 / (1 + 1 / seen.clamp(min=1))) / denominator
    new_variance = torch.where(first, spread * some / (some - 1).clamp(min=1), later)
    new_mean = torch.where(first, fresh, (mean * seen + fresh) / (seen + 1))
    empty = size == 0
    mean, variance = torch.where(empty, mean, new_mean), torch.where(empty, variance, new_variance)
    return mean, variance, torch.where(empty, seen, (seen + 1).clamp(max=WINDOWS))


def activation(window: torch.Tensor, real: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Weights ``(batch, c)`` that sum to 1: how far each token of the window lies from the mean, in units of the variance."""
    floor = variance.mean(-1, keepdim=True) / 100
    deviation = (window - mean[:, None]) ** 2 / (variance + floor).clamp(min=1e-12)[:, None]
    bias = deviation.mean(-1) * real
    total = bias.sum(1, keepdim=True)
    return torch.where(total > 1e-9, bias / total.clamp(min=1e-9), real / real.sum(1, keepdim=True).clamp(min=1))


def entropy(logits: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Entropy ``(batch,)`` of the softmax over the first ``count`` (batch,) of ``logits`` (batch, c), 1 where all are alike."""
    there = torch.arange(logits.shape[1], device=logits.device) < count[:, None]
    shares = logits.masked_fill(~there, float("-inf")).log_softmax(-1)
    spread = -(shares.exp() * shares.masked_fill(~there, 0.0)).sum(-1)
    return torch.where(count > 1, spread / count.clamp(min=2).log(), 1.0)
