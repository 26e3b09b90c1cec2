"""Exact attention of several new tokens, in blocks of rows, over whatever the cache holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from laconic.buffers import take
from laconic.cache import EMPTY
from laconic.primitives.scores import capped

FOREVER = 1 << 62  # above all positions
ROWS = 256  # rows per block where a mask is needed: the mask has ROWS x n entries, never n x n


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    reach: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last ``rows`` entries over all entries.

    Args:
        query: ``(batch, heads, rows, head_dim)``.
        keys, values: ``(batch, kv_heads, n, head_dim)``, n >= rows; the last ``rows`` belong to the queries.
        positions: int64 ``(batch, 1 or kv_heads, n)``: position of each entry, -1 for padding.
        window: a query at position p sees positions above p - window.
        bias: ``(batch, kv_heads, n)``: added to the logits of each entry.
        reach: int64 ``(batch, rows)``: the last position that a query sees, its own or a later one. None: its own.

    Returns:
        ``(batch, heads, rows, head_dim)``; rows of padding are zero.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, n = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    pads = (positions[:, 0] < 0).sum(-1).tolist()
    lasts = positions[:, 0, -1].tolist()
    fresh = rows == n and softcap is None and bias is None and reach is None
    if fresh and not any(pads) and (window is None or max(lasts) < window):
        output = _fused(*(t.flatten(0, 1) for t in (grouped, keys, values)), scale)
        return output.reshape(batch, heads, rows, -1)
    output = query.new_zeros(batch, kv_heads, heads // kv_heads, rows, values.shape[-1])
    for row in range(batch):
        pad = pads[row]
        if fresh and (window is None or lasts[row] < window) and pad < n:  # cut the padding off, the fused kernel does the rest
            part = (t[row][..., pad:, :] for t in (grouped, keys, values))
            output[row, :, :, pad:] = _fused(*part, scale)
        else:
            for begin in range(0, rows, ROWS):
                end = min(begin + ROWS, rows)
                output[row, :, :, begin:end] = _block(
                    grouped[row][:, :, begin:end], keys[row], values[row], positions[row], n - rows + begin,
                    scale, window, softcap, None if bias is None else bias[row], None if reach is None else reach[row, begin:end],
                )  # fmt: skip
    return output.view(batch, heads, rows, -1)


def sparse_prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    blocks: Iterable[tuple[int, int, torch.Tensor]],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    gone: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """As ``prefill_attention``, but each block of query rows sees only the entries that are chosen for it.

    Args:
        blocks: for each block its first row, the row after its last, and its slots, int64 ``(batch, kv_heads or 1, k)``, -1 for
            an empty one, none twice; entries after a row are not seen by it. One block's keys and values are gathered at a time.
        gone: int64 ``(batch, kv_heads, n)``: the first position whose query sees an entry no longer; None: all go on seeing it.

    Returns:
        ``(batch, heads, rows, head_dim)``, zero in rows of padding or without a visible entry; and the share of the visible
        pairs of row and entry that were chosen, mean over the batch and KV heads.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, n = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    output = query.new_zeros(batch, kv_heads, heads // kv_heads, rows, values.shape[-1])
    chosen, pairs = torch.zeros(batch, kv_heads, device=keys.device), torch.zeros(batch, kv_heads, device=keys.device)
    for begin, end, slots in blocks:
        own = positions[:, :, n - rows + begin : n - rows + end]
        first = (own - window + 1).clamp(min=0) if window is not None else torch.zeros_like(own)
        at = take(positions, slots).masked_fill(slots < 0, EMPTY)
        until = at + window if window is not None else torch.full_like(at, FOREVER)
        if gone is not None:
            until = torch.minimum(until, take(gone, slots))
            at = at.expand_as(until)
        visible, counts = _visible_rows(own, at, until)
        chosen += counts.sum(-1)
        pairs += _visible_entries(positions, own, first)
        if batch > 1:
            visible = visible.expand(-1, kv_heads, -1, -1)
        part = (grouped[..., begin:end, :], take(keys, slots), take(values, slots), visible[:, :, None])
        flat = (t.flatten(0, 1) for t in part)  # as the fused kernel wants it
        found = masked_attention(*flat, scale, softcap, blind=bool((counts == 0).any()))
        output[..., begin:end, :] = found.unflatten(0, (batch, kv_heads))
    return output.view(batch, heads, rows, -1), float((chosen / pairs.clamp(min=1)).mean())


def _visible_rows(own: torch.Tensor, at: torch.Tensor, until: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows see the entries at positions ``at`` (batch, heads, k), each before ``until``: bool ``(batch, heads, rows, k)``;
    and how many entries a row sees, ``(batch, heads, rows)``.

    ``own``: ``(batch, heads or 1, rows)``, ascending: the rows' positions. An entry is seen by a run of rows: two numbers of 32
    bits are compared for each pair, and nothing is summed over pairs.
    """
    own, rows = own.expand(-1, at.shape[1], -1).contiguous(), own.shape[2]
    first = torch.searchsorted(own, at.contiguous())
    after = torch.where(at < 0, first, torch.searchsorted(own, until.contiguous()).maximum(first))
    change = torch.zeros(*at.shape[:2], rows + 1, dtype=torch.int64, device=at.device)
    change.scatter_add_(2, first, torch.ones_like(first)).scatter_add_(2, after, -torch.ones_like(after))
    row = torch.arange(rows, dtype=torch.int32, device=at.device)[:, None]
    return (row >= first.int()[:, :, None]) & (row < after.int()[:, :, None]), change.cumsum(-1)[..., :rows]


def _visible_entries(positions: torch.Tensor, own: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """How many of ``positions`` (batch, heads, n), ascending, lie from ``first`` to ``own`` (batch, heads, rows), summed over the
    rows: ``(batch, heads)``."""
    last = torch.searchsorted(positions.contiguous(), own.contiguous(), right=True)
    low = torch.searchsorted(positions.contiguous(), first.contiguous())
    return ((last - low) * (own >= 0)).sum(-1)


def masked_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None,
    bias: torch.Tensor | None = None,
    blind: bool = True,
) -> torch.Tensor:
    """query (..., kv_heads, group, rows, d) over keys (..., kv_heads, k, d); rows that see nothing give zeros.

    ``blind``: whether there may be such rows; then they are looked for.
    """
    group = query.shape[-3]
    if softcap is None:
        keys, values = (t.unsqueeze(-3).expand(*t.shape[:-2], group, -1, -1) for t in (keys, values))
        mask = visible if bias is None else torch.where(visible, bias, float("-inf")).to(query.dtype)
        output = sdpa(query, keys, values, attn_mask=mask, scale=scale)
    else:
        logits = torch.einsum("...kgrd,...knd->...kgrn", query.float(), keys.float()) * scale
        logits = capped(logits, softcap) + (0.0 if bias is None else bias)
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        output = torch.einsum("...kgrn,...knd->...kgrd", weights, values.float()).to(query.dtype)
    return output.masked_fill(~visible.any(-1, keepdim=True), 0.0) if blind else output


def _fused(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """query (kv_heads, group, rows, d) over keys (kv_heads, rows, d): KV heads stand as the batch, so that no key is repeated."""
    group = query.shape[1]
    keys, values = (t[:, None].expand(-1, group, -1, -1) for t in (keys, values))
    return sdpa(query, keys, values, is_causal=query.shape[2] > 1, scale=scale)


def _block(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    first: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: torch.Tensor | None,
    reach: torch.Tensor | None,
) -> torch.Tensor:
    """Rows whose own entries start at slot ``first``: query (kv_heads, group, rows, d) over the slots that they can see."""
    rows = query.shape[2]
    stop = first + rows if reach is None else int((positions <= reach.max()).sum(-1).amax())
    stop, start = max(stop, first + rows), 0
    if window is not None:  # slots that no row of this block can see are not read
        start = int((positions[:, :stop] <= positions[:, first : first + 1] - window).sum(-1).amin())
    at = positions[:, start:stop]
    own = positions[:, first : first + rows, None]
    slot = torch.arange(start, stop, device=at.device)
    visible = (at[:, None] >= 0) & (slot <= torch.arange(first, first + rows, device=at.device)[:, None])
    if reach is not None:
        visible = (at[:, None] >= 0) & (at[:, None] <= torch.maximum(reach[:, None], own))
    if window is not None:
        visible = visible & (at[:, None] > own - window)
    visible = visible & (own >= 0)  # (1 or kv_heads, rows, slots)
    bias = None if bias is None else bias[:, None, None, start:stop]
    return masked_attention(query, keys[:, start:stop], values[:, start:stop], visible[:, None], scale, softcap, bias)
