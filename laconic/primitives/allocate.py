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


def largest_remainder(weights: torch.Tensor, total: torch.Tensor, caps: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the proportion of ``weights``, by the method of largest remainders (Hamilton, 1792); none above its cap.

    What a full place cannot take goes to the others, still in proportion, which makes a share x of each place. It gets the
    whole part of x, and those with the largest remainders get one more, the lowest place first among equal ones, so that every
    number is less than 1 away from x.

    Args:
        weights: float ``(..., places)``, >= 0; a place of weight 0 gets something only when the others are full. Places of
            weight 0 share equally.
        total: int ``(...)``, >= 0.
        caps: int ``(..., places)``, >= 0.

    Returns:
        int64 ``(..., places)`` that sums to ``min(total, sum of caps)``.
    """
    some = weights > 0
    weights = weights.double()
    first = _in_proportion(weights / weights.amax(-1, keepdim=True), total, caps * some)
    if bool(some.all()):
        return first
    return first + _in_proportion(torch.ones_like(weights), total - first.sum(-1), caps * ~some)


def _in_proportion(weights: torch.Tensor, total: torch.Tensor, caps: torch.Tensor) -> torch.Tensor:
    """``largest_remainder`` where a place has a weight > 0 or a cap of 0."""
    total = torch.minimum(total, caps.sum(-1))[..., None].double()
    weights, limit = weights.nan_to_num().clamp(min=1e-200), caps.double()
    order = (limit / weights).argsort(dim=-1, stable=True)  # which place is full first as all grow in proportion
    filled = limit.gather(-1, order).cumsum(-1) - limit.gather(-1, order)
    ordered = weights.gather(-1, order)
    left = ordered.flip(-1).cumsum(-1).flip(-1)  # weight of a place and of those that are full later
    factor = (total - filled) / left
    open_from = (factor * ordered >= limit.gather(-1, order)).sum(-1, keepdim=True)
    open_ = torch.minimum(limit, factor.gather(-1, open_from.clamp(max=factor.shape[-1] - 1)) * weights)
    ideal = torch.where(order.argsort(dim=-1) < open_from, limit, open_)  # what is full is full, however little is left
    whole = (ideal + 1e-9).floor()
    missing = (total - whole.sum(-1, keepdim=True)).round()
    remainder = ((ideal - whole) * 1e9).round().masked_fill(whole >= limit, -1.0)  # rounded, so that equal ones tie
    rank = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < missing)).long()
