"""Two stages: the best blocks of keys first, then the best tokens in them. No work is done per token outside those blocks."""

from __future__ import annotations

import torch

from laconic.kernels.blocks import KeyBlocks
from laconic.primitives.select import best, best_of_all_heads, check_room


def group_vote(logits: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Log of the sum of softmaxes over the heads of a group: ``(batch, heads, n)`` to ``(batch, kv_heads, n)``.

    Ranks as the soft vote does (TokenSelect, 2024) without losing small ones; -inf stays -inf.
    """
    batch, heads, n = logits.shape
    total = logits.logsumexp(-1, keepdim=True)
    shares = logits - total.masked_fill(total == float("-inf"), 0.0)
    return shares.view(batch, kv_heads, heads // kv_heads, n).logsumexp(2)


def best_blocks(
    worth: torch.Tensor,
    blocks: KeyBlocks,
    count: torch.Tensor,
    starts: torch.Tensor | None = None,
    *,
    sinks: int = 0,
    recent: int = 0,
) -> torch.Tensor:
    """The ``count`` best blocks, ascending; those of the first visible, protected and newest slots among them.

    Args:
        worth: float ``(batch, kv_heads, blocks)``; higher is better.
        count: int64 ``(batch,)``.
        starts: first visible slot ``(batch, kv_heads)``; None: what the blocks begin with.
        sinks, recent: how many first and newest slots are protected.

    Returns:
        int64 ``(batch, kv_heads, max(count))``, or fewer where there are fewer; -1 for blocks that are empty or out of sight.
    """
    first = blocks.starts if starts is None else torch.maximum(starts, blocks.starts)
    number = torch.arange(blocks.count, device=worth.device)

    def block(slot: torch.Tensor) -> torch.Tensor:
        return ((slot - blocks.origins) // blocks.size)[..., None]

    newest = torch.full_like(first, blocks.n - 1)
    forced = (number <= block(first + max(sinks, 1) - 1)) | (number >= block(newest - max(recent, 1) + 1))
    hidden = (number < block(first)) | (number >= blocks.counts[..., None])
    worth = worth.masked_fill(forced, float("inf")).masked_fill(hidden, float("-inf"))
    chosen = best(worth, count.clamp(max=blocks.count))
    return chosen.masked_fill((chosen < 0) | hidden.gather(-1, chosen.clamp(min=0)), -1)


def keep_top_among(
    slots: torch.Tensor,
    scores: torch.Tensor,
    quota: torch.Tensor,
    n: int,
    starts: torch.Tensor | None = None,
    *,
    sinks: int = 0,
    recent: int = 0,
    floor: float = 1.0,
    name: str = "selection",
) -> torch.Tensor:
    """As ``select.keep_top``, among the candidates ``slots`` only; with ``floor`` below 1 as ``select.keep_top_of_all_heads``.

    Args:
        slots: int64 ``(batch, kv_heads, c)`` ascending, -1 for an empty one.
        scores: float ``(batch, kv_heads, c)``; higher is better.
        quota: int ``(batch,)``: how many to keep per row, protected ones included.
        n: slots of the layer; the newest ``recent`` and the first ``sinks`` from ``starts`` (batch, kv_heads) on are kept.

    Returns:
        int64 ``(batch, kv_heads, max(quota))`` ascending, -1 in front.
    """
    first = torch.zeros_like(slots[..., :1]) if starts is None else starts[..., None]
    newest = torch.tensor(recent, device=quota.device).expand_as(quota)
    check_room(quota, (n - first[..., 0]).amin(-1), sinks, newest, name)
    protected = (slots < first + sinks) | (slots >= n - recent)
    worth = scores.float().masked_fill(protected, float("inf")).masked_fill(slots < first, float("-inf"))
    count = quota.clamp(max=slots.shape[-1])
    at = best(worth, count) if floor >= 1 else best_of_all_heads(worth, count, floor)
    return slots.masked_fill(slots < first, -1).gather(-1, at.clamp(min=0)).masked_fill(at < 0, -1)
