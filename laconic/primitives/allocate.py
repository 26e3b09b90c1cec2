"""Spreading one total over heads and layers."""

from __future__ import annotations

import torch


def by_score(scores: torch.Tensor, total: int, *, floor: int = 0) -> torch.Tensor:
    """Quota per head: how many of the ``total`` best entries of all heads together each head owns.

    Args:
        scores: float ``(batch, heads, n)``, comparable between heads (probabilities, for instance).
        total: tokens for all heads together.
        floor: tokens that every head gets in any case (Ada-KV, 2024, guards each head with a share of the uniform budget).

    Returns:
        int64 ``(batch, heads)`` that sums to ``min(total, heads * n)``, each entry at least ``min(floor, n)``.
    """
    batch, heads, n = scores.shape
    total = min(total, heads * n)
    guaranteed = torch.zeros_like(scores, dtype=torch.bool)
    guaranteed.scatter_(-1, scores.topk(min(floor, n), dim=-1).indices, True)
    flat = scores.masked_fill(guaranteed, float("inf")).flatten(1)
    winners = torch.zeros_like(flat, dtype=torch.bool)
    winners.scatter_(1, flat.topk(max(total, heads * min(floor, n)), dim=1).indices, True)
    return winners.view(batch, heads, n).sum(-1)
