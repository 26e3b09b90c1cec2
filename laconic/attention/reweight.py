"""Attention in which a few columns weigh more or less, from the attention to them and the attention to all others.

With p the weights as they are, s their sum over the columns and r over all others, multiplying the odds of the columns by
``factor`` gives ``(factor * sum_columns p v + sum_others p v) / (factor * s + r)``: the same as adding log(factor) to their
logits. Both sums are computed as such and never as a difference, which would lose a small rest beside a strong sink.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from laconic import kernels
from laconic.attention.prefill import prefill_attention
from laconic.buffers import take
from laconic.errors import LaconicError
from laconic.primitives.rest import others

Factor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of s and r, float32 (batch, heads, rows); see ReweightMethod


def reweighted_step(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: torch.Tensor,
    columns: torch.Tensor,
    factor: Factor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """One query per row over ``entries``: two partial attentions, which their softmax denominators put together.

    Args:
        query: ``(batch, heads, head_dim)``; keys, values: ``(batch, kv_heads, n, head_dim)``.
        entries: int64 ``(batch, kv_heads or 1, k)``: the slots that are read, -1 for none.
        columns: int64 ``(batch, kv_heads, m)``: which of the entries weigh more or less, -1 for none.

    Returns:
        ``(batch, heads, head_dim)``.
    """
    options = {"scale": scale, "softcap": softcap}
    entries = entries.expand(-1, keys.shape[1], -1)
    mine = take(entries, columns).masked_fill(columns < 0, -1)
    rest = entries.masked_fill(~others(columns, entries.shape[-1]), -1)
    (part, part_lse), (other, other_lse) = (
        kernels.selected_attention(query, keys, values, slots, **options) for slots in (mine, rest)
    )
    lse = torch.logaddexp(part_lse, other_lse)
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    s, r = ((partial - lse).exp()[..., None] for partial in (part_lse, other_lse))
    part, other = s[..., None] * part[:, :, None].float(), r[..., None] * other[:, :, None].float()
    return _mix(factor, part, other, s, r)[:, :, 0].to(query.dtype)


def reweighted_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    columns: torch.Tensor,
    factor: Factor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As ``prefill_attention``, twice: over values that are zero at ``columns``, int64 ``(batch, kv_heads, m)``, and over marks.

    The output of values that are 1 at one entry and 0 elsewhere is what this entry weighs. Marks are as wide as real values, so
    that the fused kernel serves them.
    """
    heads, (kv_heads, n, dim), m = query.shape[1], values.shape[1:], columns.shape[-1]
    if m >= dim:
        raise LaconicError(f"{m} columns cannot be reweighted at once in heads of size {dim}: at most {dim - 1}.")
    left = others(columns, n)
    marks = torch.zeros_like(values, dtype=query.dtype)
    marks[..., m] = left
    for column, slot in enumerate(columns.unbind(-1)):
        marks[..., column].scatter_(2, slot.clamp(min=0)[..., None], (slot >= 0)[..., None].to(marks))
    options = {"scale": scale, "window": window, "softcap": softcap}
    weights = prefill_attention(query, keys, marks, positions, **options)[..., : m + 1].float()
    rest = prefill_attention(query, keys, values.masked_fill(~left[..., None], 0.0), positions, **options)
    picked = take(values, columns).float().repeat_interleave(heads // kv_heads, 1)
    s, r = weights[..., :m].sum(-1), weights[..., m]
    return _mix(factor, weights[..., :m] @ picked, rest.float(), s, r).to(query.dtype)


def _mix(factor: Factor, part: torch.Tensor, rest: torch.Tensor, s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """``part`` and ``rest`` (batch, heads, rows, dim) are weighted sums of values, s and r (batch, heads, rows) of weights."""
    more = factor(s, r)
    total = more * s + r  # 0 in rows of padding, which see nothing
    return (more[..., None] * part + rest) / total.masked_fill(total == 0, 1.0)[..., None]
