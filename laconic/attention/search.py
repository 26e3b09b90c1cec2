"""The search for the tokens that a step reads: a chain of scores, each of which looks only at what the one before it left.

A method that chooses by scores is a chain and a budget. Two kinds of stages exist: ``Blocks`` scores blocks of neighbouring
tokens by what stands for each, and comes first if at all; ``Tokens`` scores tokens by their keys or by a cheaper copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from laconic import kernels
from laconic.cache import KVLayer
from laconic.kernels import Array, KeyBlocks, KeyIndex
from laconic.primitives.blocks import best_blocks, group_vote, keep_top_among
from laconic.primitives.reduce import group
from laconic.primitives.scores import capped
from laconic.primitives.select import keep_top, keep_top_of_all_heads
from laconic.selection import Selection

if TYPE_CHECKING:
    from laconic.attention.base import Call, ReadMethod


@dataclass(frozen=True)
class Keys:
    """What tokens are scored by.

    Attributes:
        query: ``(batch, heads, dim)``: the query that belongs to these keys.
        keys: ``(batch, kv_heads, n, dim)``; index: where the bytes of an 8-bit copy are read in their place.
        softcap: of the logits, or None.
    """

    query: torch.Tensor
    keys: Array
    index: KeyIndex | None = None
    softcap: float | None = None

    def bytes(self, slots: torch.Tensor | None = None) -> int:
        """Bytes that scoring ``slots`` (batch, kv_heads, c), -1 for none, or all tokens reads."""
        if self.index is not None:
            return self.index.bytes if slots is None else self.index.bytes_of(slots)
        read = self.keys.numel() if slots is None else int((slots >= 0).sum()) * self.keys.shape[-1]
        return read * self.keys.element_size()


def exact_keys(layer: KVLayer, call: Call) -> Keys:
    """The keys themselves: scores are the attention's own logits."""
    return Keys(call.last, layer.keys, softcap=call.softcap)


def int8_keys(layer: KVLayer, call: Call) -> Keys:
    """Their 8-bit copies, which stand beside the cache."""
    return Keys(call.last, layer.keys, layer.key_index(), call.softcap)


@dataclass(frozen=True)
class Tokens:
    """A stage that scores tokens by the soft vote of the query heads of each KV head: softmax per head over the candidates,
    the protected ones aside, summed.

    Attributes:
        keys: what it scores by. oversample: tokens that stay per token of the budget, unless the stage is the last.
    """

    keys: Callable[[KVLayer, Call], Keys]
    oversample: float = 1.0


@dataclass(frozen=True)
class Blocks:
    """A stage that scores blocks of ``size`` tokens; those that hold protected tokens, the first and the last always stay.

    Attributes:
        kind: what stands for a block: ``bounds`` (the largest product that a key of it can have) or ``mean``.
        reduce: query heads to KV heads: ``vote`` (softmax over the blocks, summed), or max, mean or sum of plain products.
        oversample: as in ``Tokens``. As the last stage, the best blocks are read until the budget is used, the last in part.
    """

    size: int
    kind: str = "bounds"
    reduce: str = "vote"
    oversample: float = 1.0

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """``(batch, kv_heads, blocks)``; -inf for a block that is empty."""
        blocks = layer.key_blocks(self.size, self.kind)
        if self.kind == "bounds":
            products = kernels.block_bounds(call.last, blocks)
        else:
            products = kernels.logits(call.last.float(), blocks.mean)
            empty = torch.arange(blocks.count, device=products.device) >= blocks.counts[..., None]
            products.masked_fill_(empty.repeat_interleave(products.shape[1] // empty.shape[1], 1), float("-inf"))
        if self.reduce != "vote":
            return group(products, layer.heads, self.reduce)
        return group_vote(capped(products * call.scale, call.softcap), layer.heads)


def search(
    method: ReadMethod, layer: KVLayer, call: Call, chain: Sequence[Blocks | Tokens], *, floor: float = 1.0
) -> Selection | None:
    """The ``method``'s budget of tokens, found by a chain of stages; None when there is nothing to leave out.

    Every stage keeps ``oversample`` tokens per token of the budget for the next one to score, the last one the budget. The
    first and newest tokens that the method protects never compete. All KV heads choose for themselves; with ``floor`` below 1
    those of a row share their budgets, and each gets at least that share of its own (Ada-KV, 2024).
    """
    if method.covers(layer, call):
        return None
    quota, starts = method.quota(layer, call), layer.starts(call.window)
    ends = {"sinks": method.sinks, "recent": method.recent}
    slots, scored = None, 0
    for stage in chain:
        last = stage is chain[-1]
        keep = quota if last else torch.maximum(quota, (quota * stage.oversample).long())
        if isinstance(stage, Blocks):
            blocks, worth = layer.key_blocks(stage.size, stage.kind), stage.worth(layer, call)
            slots = _members(blocks, worth, quota, keep, starts, **ends)
            scored += blocks.bytes
            if not last:
                continue
            scores = worth.gather(-1, blocks.of(slots).clamp(min=0))
        else:
            keys = stage.keys(layer, call)
            if slots is None:
                votes, scored = flat_vote(keys, layer, call, **ends), keys.bytes()
                if last and floor < 1:
                    slots = keep_top_of_all_heads(votes, keep, starts, **ends, floor=floor, name=method.id)
                else:
                    slots = keep_top(votes, keep, starts, **ends, name=method.id)
                continue
            scores, read = _vote_among(slots, keys, layer, call, **ends)
            scored += read
        share = floor if last else 1.0
        slots = keep_top_among(slots, scores, keep, layer.n, starts, **ends, floor=share, name=method.id)
    return Selection(slots, bytes_scored=scored)


def _members(
    blocks: KeyBlocks, worth: torch.Tensor, quota: torch.Tensor, keep: torch.Tensor, starts: torch.Tensor | None, **ends: int
) -> torch.Tensor:
    """Slots of the best blocks, ``(batch, kv_heads, c)``: of as many as hold ``keep`` (batch,) tokens, and never too few for
    ``quota`` (batch,)."""
    slots = blocks.slots(best_blocks(worth, blocks, candidate_blocks(quota, keep, blocks.size), starts, **ends))
    return slots[..., int((slots < 0).sum(-1).min()) :]  # without those that are empty everywhere


def candidate_blocks(quota: torch.Tensor, keep: torch.Tensor, size: int) -> torch.Tensor:
    """How many blocks of ``size`` go on to the next stage, ``(batch,)``: as many as hold ``keep`` tokens, and never too few for
    ``quota``, whatever is cut of those that have to stay: four at most."""
    return torch.maximum(-(-quota // size) + 4, keep // size)


def flat_vote(
    keys: Keys, layer: KVLayer, call: Call, *, sinks: int, recent: int, scale: float | None = None, over: str = "group"
) -> torch.Tensor:
    """Soft vote for all tokens between the protected ones, ``(batch, kv_heads, n)``, or ``(batch, 1, n)`` over the layer."""
    starts = layer.starts(call.window)
    begin = torch.zeros(keys.query.shape[0], layer.heads, dtype=torch.int64) if starts is None else starts
    return kernels.vote(
        keys.query, keys.keys, scale=call.scale if scale is None else scale, starts=begin.to(keys.query.device) + sinks,
        stop=layer.n - recent, over=over, index=keys.index, softcap=keys.softcap,
    )  # fmt: skip


def _vote_among(
    slots: torch.Tensor, keys: Keys, layer: KVLayer, call: Call, *, sinks: int, recent: int
) -> tuple[torch.Tensor, int]:
    """Log votes ``(batch, kv_heads, c)`` for the candidates ``slots``, and the bytes read; -inf for protected ones."""
    starts = layer.starts(call.window)
    first = 0 if starts is None else starts[..., None]
    free = slots.masked_fill((slots < first + sinks) | (slots >= layer.n - recent), -1)
    logits = kernels.logits(keys.query, keys.keys, scale=call.scale, indices=free, index=keys.index)
    return group_vote(capped(logits, keys.softcap), layer.heads), keys.bytes(free)
