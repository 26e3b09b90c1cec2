"""Putting together what the parallel parts of a kernel left: shared by the CPU and the GPU versions."""

from __future__ import annotations

import torch


def combine(
    parts: torch.Tensor, state: torch.Tensor, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from its splits.

    Args:
        parts: float32 ``(batch, kv_heads, splits, padded group, value_dim)``: sums of weight times value, not normalised.
        state: float32 ``(batch, kv_heads, splits, padded group, 2)``: largest logit of the split (-inf if it is empty) and
            the sum of exp(logit - largest).
        query: ``(batch, heads, head_dim)``, for dtype and the true group size.

    Returns:
        output ``(batch, heads, value_dim)`` in the query's dtype and lse ``(batch, heads)`` float32.
    """
    batch, heads = query.shape[:2]
    group = heads // parts.shape[1]
    parts, state = parts[:, :, :, :group], state[:, :, :, :group]
    top = state[..., 0].amax(2)
    weight = (state[..., 0] - top.masked_fill(top == float("-inf"), 0.0)[:, :, None]).exp()
    total = (weight * state[..., 1]).sum(2)
    merged = (weight[..., None] * parts).sum(2) / total.clamp(min=1e-38)[..., None]
    lse = top + total.log()
    return merged.reshape(batch, heads, -1).to(query.dtype), lse.reshape(batch, heads)


def factors(tops: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """What each chunk's exp(logit - its top) is multiplied by to become a probability, ``(..., chunks)`` like both inputs."""
    best = tops.amax(-1, keepdim=True)
    scaled = (tops - best.masked_fill(best == float("-inf"), 0.0)).exp()
    return scaled / (scaled * sums).sum(-1, keepdim=True).clamp(min=1e-38)
