"""From query heads to KV heads to layers, and over neighbouring positions."""

from __future__ import annotations

import torch

from laconic.errors import LaconicError

GROUP = ("mean", "max", "sum")


def group(scores: torch.Tensor, kv_heads: int, how: str = "mean") -> torch.Tensor:
    """``(batch, heads, n)`` per query head to ``(batch, kv_heads, n)``: mean, max or sum over each contiguous group."""
    batch, heads, n = scores.shape
    grouped = scores.view(batch, kv_heads, heads // kv_heads, n)
    if how == "mean":
        return grouped.mean(2)
    if how == "max":
        return grouped.amax(2)
    if how == "sum":
        return grouped.sum(2)
    raise LaconicError(f"Reduction '{how}' is unknown: use one of {', '.join(GROUP)}.")


def pool(
    scores: torch.Tensor, kernel: int, how: str = "avg", starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Smooths ``(batch, heads, n)``, >= 0, over positions with an odd ``kernel``; the length stays. 1 changes nothing.

    ``avg`` divides by the neighbours that exist, so that the ends are not favoured or punished; ``max`` takes the largest.
    Slots before ``starts`` (batch, heads) are padding and do not exist.
    """
    if kernel <= 1:
        return scores
    if kernel % 2 == 0:
        raise LaconicError(f"Pooling width {kernel} is even, which would shift positions: give an odd number.")
    if how == "avg":
        exists = torch.ones_like(scores)
        if starts is not None:
            exists = (torch.arange(scores.shape[-1], device=scores.device) >= starts[..., None]).to(scores.dtype)
        total, count = (
            torch.nn.functional.avg_pool1d(t.expand_as(scores), kernel, 1, kernel // 2) for t in (scores * exists, exists)
        )
        return total / count.clamp(min=1e-9)
    if how == "max":
        return torch.nn.functional.max_pool1d(scores, kernel, 1, kernel // 2)
    raise LaconicError(f"Pooling '{how}' is unknown: use avg or max.")
