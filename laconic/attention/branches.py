"""Attention of a draft tree: every node sees the text and the nodes on its way to the root."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from laconic.attention.prefill import masked_attention
from laconic.cache import KVLayer
from laconic.kernels.ragged import dense

if TYPE_CHECKING:
    from laconic.attention.base import Call


@dataclass(frozen=True, eq=False)
class Branches:
    """Says of a running forward that its tokens are nodes of a draft tree, whose entries are the newest of the cache.

    Attributes:
        positions: int64 ``(batch, new)``: where each new node stands in its own text, -1 for an empty one. Siblings share one.
        sees: boolean ``(batch, new, tail)``: which of the newest ``tail`` entries, the new ones included, each new node sees.
    """

    positions: torch.Tensor
    sees: torch.Tensor
    _whole: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def tail(self) -> int:
        return self.sees.shape[2]

    def over(self, n: int, group: int) -> torch.Tensor:
        """Boolean ``(batch, 1, group * new, n)``: what is seen of ``n`` entries that are all real, once for each query head of a
        KV head. Layers of as many share it."""
        if (n, group) not in self._whole:
            seen = torch.nn.functional.pad(self.sees, (n - self.tail, 0), value=True)
            self._whole[n, group] = seen.repeat(1, group, 1)[:, None]
        return self._whole[n, group]


def branch_attention(layer: KVLayer, call: Call, branches: Branches) -> torch.Tensor:
    """Output ``(batch, heads, new, head_dim)`` of all nodes over everything that the layer holds; noise in empty nodes."""
    query, keys, values = call.query, dense(layer.keys), dense(layer.values)
    batch, heads, _, dim = query.shape
    group = heads // layer.heads
    rows = query.reshape(batch, layer.heads, -1, dim)  # queries of a KV head stand as rows, so that no key is repeated
    visible = branches.over(layer.n, group)
    if layer.padded:
        visible = visible & (layer.shared_positions >= 0)[:, :, None]
    if call.window is not None:
        at = branches.positions.repeat(1, group)[:, None, :, None]
        visible = visible & (layer.shared_positions[:, :, None] > at - call.window)
    bias = None
    if layer.rest is not None:
        key, value, more = layer.rest.entry(keys.dtype)
        keys, values = torch.cat([key, keys], dim=2), torch.cat([value, values], dim=2)
        stands = (layer.rest.count > 0)[..., None, :].expand(-1, -1, visible.shape[2], -1)
        visible = torch.cat([stands, visible.expand(-1, layer.heads, -1, -1)], dim=-1)
        bias = torch.nn.functional.pad(more, (0, keys.shape[2] - 1))[:, :, None, None]
    visible = visible.expand(-1, layer.heads, -1, -1).unsqueeze(2)
    flat = (t.flatten(0, 1) for t in (rows.unsqueeze(2), keys, values, visible))  # as the fused kernel wants it
    bias = None if bias is None else bias.flatten(0, 1)
    blind = layer.n == branches.tail  # where there is text, all rows see it, those of empty nodes too
    return masked_attention(*flat, call.scale, call.softcap, bias, blind=blind).reshape(*query.shape[:3], -1)


def each_branch(
    layer: KVLayer, call: Call, branches: Branches, step: Callable[[KVLayer, Call], torch.Tensor]
) -> torch.Tensor:
    """As ``branch_attention``, but each node is the decode step that it would be if the nodes before it had been accepted.

    For methods that choose what a step reads: each node chooses for itself. One row of a batch only.

    Args:
        step: attention of a single new token, ``(1, heads, 1, head_dim)``.
    """
    new, base = branches.positions.shape[1], layer.n - branches.tail
    known = layer.branches  # what the layer remembered after each node that earlier forwards brought
    before, tail = layer.state(), layer.set_aside(base)
    outputs = []
    for at in range(new):
        node, sees = branches.tail - new + at, branches.sees[0, at].nonzero()[:, 0]
        layer.set_state(known[int(sees[-2])] if len(sees) > 1 else before)
        layer.put_back(tail, sees)
        outputs.append(step(layer, dataclasses.replace(call, query=call.query[:, :, at : at + 1])))
        known[node] = layer.state()
        layer.cut(base)
    layer.set_state(before)
    layer.put_back(tail, torch.arange(branches.tail, device=call.query.device))
    return torch.cat(outputs, dim=2)
