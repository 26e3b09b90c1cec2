"""LongHeads: every head reads its own few chunks, which stand where the model was trained to see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import POSITIONS, AttentionMethod, Call, ReadMethod
from laconic.attention.queries import join_queries
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.reduce import GROUP, group
from laconic.primitives.select import keep_top
from laconic.registry import register
from laconic.selection import Selection

FLOATS = 1 << 24  # of attention weights inside chunks that are held at a time
FORCED = torch.finfo(torch.float32).max  # above every score, below the protected tokens


@register
@dataclass(frozen=True, kw_only=True)
class LongHeads(ReadMethod):
    """Reads the first, the previous and the current chunk of ``chunk`` tokens, and the best others for each KV head.

    A chunk is scored by its key: attention inside the chunk, averaged over its tokens, asks the chunk's own keys once more
    and gets their mean, weighted by its answer. All is done with positions counted from the beginning of the chunk, and a
    query is compared free of its position, so that distance has no say. Only whole chunks are read beside the current one,
    as far as the budget goes. With ``positions=compact`` they are renumbered without gaps, which lets a model read texts
    beyond its trained length; the prompt then has to come in pieces (``prefill_chunk_size``), each of which reads one choice
    of chunks and itself. Where the queries of a chunk are not at hand any more its mean key stands in. Memory does not shrink.
    """

    id: ClassVar[str] = "longheads"
    paper: ClassVar[str] = "LongHeads: Multi-Head Attention is Secretly a Long Context Processor (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("quest"))

    chunk: int = parameter(32, "tokens per chunk; the original has 256 and a budget of 4096", least=1)
    reduce: str = parameter("max", "from query heads to their KV head: max, mean or sum of the scores")
    positions: str = parameter("keep", "keep: where the tokens stand; compact: renumbered without gaps")

    def check(self) -> None:
        self.require(self.positions in POSITIONS, f"positions must be one of {', '.join(POSITIONS)}.")
        self.require(self.reduce in GROUP, f"reduce must be one of {', '.join(GROUP)}.")

    @property
    def reads_chunks(self) -> bool:  # type: ignore[override]
        """With compact positions the prompt too is read through the selection, piece by piece."""
        return self.positions == "compact"

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        if self.covers(layer, call):
            return None
        if self.positions == "compact":
            self.need_rope(layer)
        new, starts, quota = call.query.shape[2], layer.starts(call.window), self.quota(layer, call)
        current = layer.lengths % self.chunk
        whole = ((quota - current) // self.chunk * self.chunk + current).clamp(min=self.sinks + self.recent)
        quota = torch.where((quota >= 3 * self.chunk) & ~self.covered(layer, call), torch.minimum(whole, quota), quota)
        if not call.decoding:
            quota = torch.minimum(quota + new, layer.lengths)
            if bool((quota == layer.lengths).all()):
                return None
        worth, scored = self._worth(layer, call)
        slots = keep_top(worth, quota, starts, self.sinks, max(self.recent, new), self.id)
        if self.positions == "keep":
            return Selection(slots, scored)
        rank = (slots >= 0).cumsum(-1) - 1
        return Selection(slots, scored, key_positions=rank, query_shift=rank[:, 0, -1] + 1 - layer.lengths)

    def _worth(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, int]:
        """Score of its chunk for every entry, ``(batch, kv_heads, n)``, and the bytes of chunk keys read for it."""
        at = layer.positions.clamp(min=0) // self.chunk
        current = (layer.lengths - call.query.shape[2])[:, None, None] // self.chunk
        forced = (at == 0) | (at >= current - 1)
        keys = layer.memory.get(self.id + ".keys")
        if keys is None:
            return torch.zeros(at.shape, device=at.device).masked_fill(forced, FORCED), 0
        query = self._turned(layer, call.query, None).float().mean(2)
        scores = group(torch.einsum("bhd,bhcd->bhc", query, keys), layer.heads, self.reduce)
        worth = scores.gather(-1, at.clamp(max=scores.shape[-1] - 1))
        return worth.masked_fill(forced, FORCED), keys.numel() * keys.element_size()

    def observe(self, layer: KVLayer, call: Call) -> None:
        """Makes the keys of the chunks that are now complete."""
        queries = join_queries(layer.memory, self.id + ".query", call.query, self.chunk)
        known = layer.memory.get(self.id + ".keys")
        before = 0 if known is None else known.shape[2]
        done = (layer.lengths // self.chunk).tolist()
        had = [min(before, (length - call.query.shape[2]) // self.chunk) for length in layer.lengths.tolist()]
        if max(done) and any(a < b for a, b in zip(had, done, strict=True)):
            batch, heads, _, dim = call.query.shape
            keys = call.query.new_zeros(batch, heads, max(*done, before), dim, dtype=torch.float32)
            if known is not None:
                keys[:, :, :before] = known
            for row, (a, b) in enumerate(zip(had, done, strict=True)):
                if max(a, 0) < b:
                    keys[row, :, max(a, 0) : b] = self._chunk_keys(layer, queries, row, max(a, 0), b, call.scale)
            layer.memory[self.id + ".keys"] = keys

    def _chunk_keys(
        self, layer: KVLayer, queries: torch.Tensor, row: int, first: int, last: int, scale: float
    ) -> torch.Tensor:
        """Keys ``(heads, last - first, head_dim)`` of chunks first..last-1 of one row."""
        size, heads = self.chunk, queries.shape[1]
        span = int(layer.lengths[row]) - first * size  # tokens from the first of these chunks on
        begin, end = layer.n - span, layer.n - span + (last - first) * size
        complete = begin >= 0 and bool((layer.positions[row, :, begin] == first * size).all())
        if not complete or span > queries.shape[2] or layer.values.shape[-1] != layer.keys.shape[-1]:
            return self._means(layer, row, first, last).repeat_interleave(heads // layer.heads, 0)
        keys = self._turned(layer, layer.keys[row : row + 1, :, begin:end], first)[0]
        values, at = layer.values[row, :, begin:end], queries.shape[2] - span
        query = self._turned(layer, queries[row : row + 1, :, at : at + (last - first) * size], first)[0]
        parts, step = [], max(1, FLOATS // (heads * size * size)) * size
        for low in range(0, keys.shape[1], step):
            part = (t[:, low : low + step].unflatten(1, (-1, size)).float() for t in (query, keys, values))
            parts.append(_summaries(*part, scale=scale))
        return torch.cat(parts, dim=1)

    def _means(self, layer: KVLayer, row: int, first: int, last: int) -> torch.Tensor:
        """Mean keys ``(kv_heads, last - first, head_dim)`` of what is left of chunks first..last-1 of one row."""
        keys, number = layer.keys[row], layer.positions[row] // self.chunk - first
        others = last - first  # one place more, for the entries of all other chunks
        index = number.masked_fill((number < 0) | (number > others), others)
        total = torch.zeros(len(keys), others + 1, keys.shape[-1], device=keys.device)
        count = torch.zeros(len(keys), others + 1, 1, device=keys.device)
        step = max(1, FLOATS // (len(keys) * keys.shape[-1]))
        for low in range(int((number < 0).sum(-1).min()), layer.n, step):  # entries stand in the order of their positions
            part, at = keys[:, low : low + step], index[:, low : low + step]
            if layer.rope is not None:
                part = layer.rope.rotate(part, -(at + first) * self.chunk)
            total.scatter_add_(1, at[..., None].expand_as(part), part.float())
            count.scatter_add_(1, at[..., None], torch.ones_like(part[..., :1], dtype=torch.float32))
        return (total / count.clamp(min=1))[:, :-1]

    def _turned(self, layer: KVLayer, x: torch.Tensor, first: int | None) -> torch.Tensor:
        """The newest queries without their positions, or entries from chunk ``first`` on with positions in their chunk."""
        if layer.rope is None:
            return x
        if first is None:
            return layer.rope.rotate(x, -layer.shared_positions[:, :1, -x.shape[2] :].clamp(min=0))
        begin = (first + torch.arange(x.shape[2], device=x.device) // self.chunk) * self.chunk
        return layer.rope.rotate(x, -begin)


def _summaries(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Chunk keys ``(heads, chunks, dim)`` from query ``(heads, chunks, size, dim)``, keys and values ``(kv_heads, ...)``."""
    keys, values = (t.repeat_interleave(query.shape[0] // t.shape[0], 0) for t in (keys, values))
    answer = ((query @ keys.transpose(-1, -2) * scale).softmax(-1) @ values).mean(2, keepdim=True)
    return ((answer @ keys.transpose(-1, -2) * scale).softmax(-1) @ keys)[:, :, 0]
