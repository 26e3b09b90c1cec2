"""Which set, given worth and budget. All selections are slots in ascending order, -1 for an empty slot, ties to the lowest."""

from __future__ import annotations

import math

import torch

from laconic import kernels
from laconic.errors import LaconicError
from laconic.primitives.allocate import by_score


def keep_top(
    scores: torch.Tensor,
    quota: torch.Tensor,
    starts: torch.Tensor | None = None,
    sinks: int = 0,
    recent: int | torch.Tensor = 0,
    name: str = "selection",
) -> torch.Tensor:
    """Top-k by row with protected ends.

    Args:
        scores: float ``(batch, heads, n)``; higher is better.
        quota: int ``(batch,)``: how many to keep per row, protected ones included.
        starts: first visible slot ``(batch, kv_heads)``; slots before it are never kept. None: all are visible.
        sinks, recent: how many of the first and of the newest visible slots are always kept; ``recent`` also per row (batch,).
        name: who asks, for the error.

    Returns:
        int64 ``(batch, heads, max(quota))``; all KV heads are told apart when one choice for all meets different ``starts``.

    Raises:
        LaconicError: when a row has more tokens than its quota and the quota cannot hold the protected ones.
    """
    return hide(best(protect(scores, quota, starts, sinks, recent, name), quota), starts)


def keep_top_of_all_heads(
    scores: torch.Tensor,
    quota: torch.Tensor,
    starts: torch.Tensor | None = None,
    sinks: int = 0,
    recent: int | torch.Tensor = 0,
    floor: float = 0.0,
    name: str = "selection",
) -> torch.Tensor:
    """As ``keep_top``, but the heads of a row share ``heads * quota`` entries: the best of all heads, wherever they are.

    Every head keeps its protected entries and at least the share ``floor`` of its even quota. Heads with fewer entries than
    others get empty slots (-1) in front. Scores must be comparable between heads (Ada-KV, 2024).
    """
    return hide(best_of_all_heads(protect(scores, quota, starts, sinks, recent, name), quota, floor), starts)


def best_of_all_heads(worth: torch.Tensor, quota: torch.Tensor, floor: float) -> torch.Tensor:
    """As ``best``, but the ``heads * quota`` largest of all heads of a row, at least ``ceil(floor * quota)`` of each head."""
    quotas = torch.zeros(*worth.shape[:2], dtype=torch.int64, device=worth.device)
    for row, k in enumerate(quota.tolist()):
        if k:
            quotas[row] = by_score(worth[row : row + 1], k * worth.shape[1], floor=math.ceil(floor * k))[0]
    return quota_top(worth, quotas)


def protect(
    scores: torch.Tensor,
    quota: torch.Tensor,
    starts: torch.Tensor | None,
    sinks: int,
    recent: int | torch.Tensor,
    name: str,
) -> torch.Tensor:
    """Scores in which protected entries are +inf and hidden ones -inf; arguments and error as in ``keep_top``."""
    batch, heads, n = scores.shape
    slot = torch.arange(n, device=scores.device)
    recent = torch.as_tensor(recent, device=slot.device).expand(batch)
    first = torch.zeros(1, 1, 1, dtype=torch.int64, device=slot.device)
    if starts is not None:
        first = (starts if heads > 1 else starts.amin(1, keepdim=True))[..., None]
    check_room(quota, (n - first[..., 0]).amin(-1), sinks, recent, name)
    worth = scores.float().masked_fill((slot < first + sinks) | (slot >= n - recent[:, None, None]), float("inf"))
    return worth.masked_fill(slot < first, float("-inf"))


def check_room(quota: torch.Tensor, visible: torch.Tensor, sinks: int, recent: torch.Tensor, name: str) -> None:
    """Refuses a ``quota`` (batch,) that is below the ``visible`` tokens (batch,) and below the protected ones."""
    if bool(((quota < sinks + recent) & (quota < visible)).any()):
        raise LaconicError(
            f"{name}: a budget of {int(quota.min())} tokens cannot hold the {sinks} first and {int(recent.max())} newest tokens "
            "that are always kept: give a larger budget, or lower sinks and recent."
        )


def best(worth: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """The ``quota`` (batch,) largest of ``worth`` (batch, heads, n): ``(batch, heads, max(quota))``, -1 in front where fewer."""
    largest = int(quota.max())
    if largest and bool((quota == largest).all()):
        return kernels.topk(worth, largest)
    picked = torch.full((*worth.shape[:2], largest), -1, dtype=torch.int64, device=worth.device)
    for row, k in enumerate(quota.tolist()):
        if k:  # none where a row has only padding so far
            picked[row, :, largest - k :] = kernels.topk(worth[row : row + 1], k)[0]
    return picked


def marked(stays: torch.Tensor) -> torch.Tensor:
    """The slots where boolean ``stays`` (..., n) is set, int64 ``(..., k)`` ascending, -1 in front where others have more."""
    slots = torch.where(stays, torch.arange(stays.shape[-1], device=stays.device), -1).sort(dim=-1).values
    return slots[..., int((~stays).sum(-1).min()) :]


def hide(slots: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """Empties those of the ascending ``slots`` (batch, heads or 1, k) that lie before ``starts`` (batch, kv_heads).

    One choice for all heads becomes one per head when the heads see different slots.
    """
    if starts is None:
        return slots
    if slots.shape[1] < starts.shape[1] and bool((starts != starts[:, :1]).any()):
        slots = slots.expand(-1, starts.shape[1], -1)
    return slots.masked_fill(slots < starts[:, : slots.shape[1], None], -1)


def threshold(scores: torch.Tensor, value: float) -> torch.Tensor:
    """Boolean ``(..., n)``: scores above ``value``."""
    return scores > value


def coverage(weights: torch.Tensor, mass: float) -> torch.Tensor:
    """Boolean ``(..., n)``: the smallest set of largest ``weights`` (..., n, >= 0) that holds at least ``mass`` of their sum."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    sorted_weights = weights.gather(-1, order)
    before = sorted_weights.cumsum(-1) - sorted_weights
    needed = before < mass * weights.sum(-1, keepdim=True)
    return torch.zeros_like(needed).scatter(-1, order, needed)


def quota_top(scores: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """Top-k with a quota per head: ``(batch, heads, max(quota))`` of ``scores`` (batch, heads, n), ``quota`` (batch, heads).

    Heads with a smaller quota get empty slots (-1) in front.
    """
    largest = int(quota.max())
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :largest]
    rank = torch.arange(largest, device=scores.device)
    return order.masked_fill(rank >= quota[..., None], -1).sort(dim=-1).values
