"""Attention of some of the query heads: the others, and KV heads that serve no other, are not computed and not read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from laconic import kernels
from laconic.attention.base import Call
from laconic.attention.prefill import prefill_attention
from laconic.cache import KVLayer
from laconic.primitives.scores import capped

ALL = slice(None)


@dataclass(frozen=True)
class Part:
    """Query heads that one call of a kernel serves: the same number of them for every KV head of a run.

    Attributes:
        rows: rows of the batch.
        kv: the run of KV heads.
        heads: the query heads, int64 ascending, or all of them.
    """

    rows: slice = field(default_factory=lambda: ALL)
    kv: slice = field(default_factory=lambda: ALL)
    heads: torch.Tensor | slice = field(default_factory=lambda: ALL)

    def query(self, call: Call) -> torch.Tensor:
        """``(rows, heads, new, head_dim)``."""
        return call.query[self.rows][:, self.heads]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What belongs to the part of a tensor ``(batch, kv_heads or 1, ...)``, a view."""
        return tensor[self.rows][:, self.kv if tensor.shape[1] > 1 else slice(None)]

    def put(self, whole: torch.Tensor, values: torch.Tensor) -> None:
        """Writes ``values`` (rows, heads, ...) where they belong in ``whole`` (batch, heads, ...)."""
        whole[self.rows, self.heads] = values.to(whole.dtype)


def parts_of(chosen: torch.Tensor, kv_heads: int) -> list[Part]:
    """The parts that make up the query heads ``chosen``, boolean ``(batch, heads)``."""
    if bool(chosen.all()):
        return [Part()]
    parts = []
    group = chosen.shape[1] // kv_heads
    for row, counts in enumerate(chosen.view(chosen.shape[0], kv_heads, group).sum(-1).tolist()):
        begin = 0
        for count, run in itertools.groupby(counts):
            end = begin + len(list(run))
            if count:
                heads = chosen[row, begin * group : end * group].nonzero()[:, 0] + begin * group
                parts.append(Part(slice(row, row + 1), slice(begin, end), heads))
            begin = end
    return parts


def attend(layer: KVLayer, call: Call, parts: list[Part]) -> torch.Tensor:
    """Exact attention of the heads of ``parts``, ``(batch, heads, new, head_dim)``; 0 for all others."""
    output = call.query.new_zeros(*call.query.shape[:3], layer.values.shape[-1])
    starts = layer.starts(call.window)
    options = {"scale": call.scale, "softcap": call.softcap}
    for part in parts:
        query, keys, values = part.query(call), part.of(layer.keys), part.of(layer.values)
        if call.decoding:
            first = None if starts is None else part.of(starts)
            part.put(output, kernels.decode_attention(query[:, :, 0], keys, values, starts=first, **options)[0][:, :, None])
        else:
            at = part.of(layer.shared_positions)
            part.put(output, prefill_attention(query, keys, values, at, window=call.window, **options))
    return output


def received(layer: KVLayer, call: Call, coming: torch.Tensor, parts: list[Part]) -> torch.Tensor:
    """Attention probability that each entry receives from the heads of ``parts``, summed over the real rows of the call.

    Args:
        coming: positions ``(batch, new)`` of the rows; those of padding give nothing.

    Returns:
        float32 ``(batch, heads, n)``; 0 for all other heads and for empty slots.
    """
    output = call.query.new_zeros(*call.query.shape[:2], layer.n, dtype=torch.float32)
    starts, positions = layer.starts(call.window if call.decoding else None), layer.shared_positions
    window = None if call.decoding else call.window
    gaps = window is not None and bool(((positions >= 0).sum(-1) < layer.lengths[:, None]).any())
    pads = (coming < 0).sum(-1).tolist()
    if any(pads):  # every row has a beginning of its own
        rows = range(len(pads))
        parts = [Part(slice(r, r + 1), p.kv, p.heads) for r in rows for p in parts if p.rows.start in (None, r)]
    for part in parts:
        pad = pads[part.rows.start or 0]
        if pad == call.query.shape[2]:
            continue
        sums = kernels.column_sums(
            part.query(call)[:, :, pad:], part.of(layer.keys), scale=call.scale, softcap=call.softcap,
            starts=None if starts is None else part.of(starts),
            window=window, positions=part.of(positions) if gaps else None,
        )  # fmt: skip
        part.put(output, sums)
    return output


def probabilities(layer: KVLayer, call: Call, part: Part, starts: torch.Tensor | None) -> torch.Tensor:
    """Probabilities ``(rows, heads, n)`` of the heads of a part in a step, from the first visible slots ``starts`` on."""
    query = part.query(call)
    logits = capped(kernels.logits(query[:, :, 0], part.of(layer.keys), scale=call.scale), call.softcap)
    if starts is not None:
        first = part.of(starts).repeat_interleave(query.shape[1] // part.of(starts).shape[1], 1)
        hidden = torch.arange(layer.n, device=logits.device) < first[..., None]
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0)


def bytes_of(layer: KVLayer, parts: list[Part], *, keys: int = 1, values: int = 1) -> int:
    """Bytes of the cache that ``parts`` read when each reads its keys and its values that often."""
    return sum(
        keys * k.numel() * k.element_size() + values * v.numel() * v.element_size()
        for k, v in ((part.of(layer.keys), part.of(layer.values)) for part in parts)
    )
