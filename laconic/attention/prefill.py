"""Exact attention of several new tokens, in blocks of rows, over whatever the cache holds."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

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
) -> torch.Tensor:
    """Causal attention of the last ``rows`` entries over all entries.

    Args:
        query: ``(batch, heads, rows, head_dim)``.
        keys, values: ``(batch, kv_heads, n, head_dim)``, n >= rows; the last ``rows`` belong to the queries.
        positions: int64 ``(batch, 1 or kv_heads, n)``: position of each entry, -1 for padding.
        window: a query at position p sees positions above p - window.

    Returns:
        ``(batch, heads, rows, head_dim)``; rows of padding are zero.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, n = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    output = query.new_zeros(batch, kv_heads, heads // kv_heads, rows, values.shape[-1])
    pads = (positions[:, 0] < 0).sum(-1).tolist()
    lasts = positions[:, 0, -1].tolist()
    for row in range(batch):
        pad = pads[row]
        plain = rows == n and softcap is None and (window is None or lasts[row] < window) and pad < n
        if plain:  # a fresh prompt: cut the padding off and let the fused kernel do the rest
            part = (t[row][..., pad:, :] for t in (grouped, keys, values))
            output[row, :, :, pad:] = _fused(*part, scale)
        else:
            for begin in range(0, rows, ROWS):
                end = min(begin + ROWS, rows)
                output[row, :, :, begin:end] = _block(
                    grouped[row][:, :, begin:end], keys[row], values[row], positions[row], n - rows + begin,
                    scale, window, softcap,
                )  # fmt: skip
    return output.view(batch, heads, rows, -1)


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
) -> torch.Tensor:
    """Rows whose own entries start at slot ``first``: query (kv_heads, group, rows, d) over the slots that they can see."""
    group, rows = query.shape[1:3]
    stop = first + rows
    start = 0
    if window is not None:  # slots that no row of this block can see are not read
        start = int((positions[:, :stop] <= positions[:, first : first + 1] - window).sum(-1).amin())
    at = positions[:, start:stop]
    own = positions[:, first:stop, None]
    slot = torch.arange(start, stop, device=at.device)
    visible = (at[:, None] >= 0) & (slot <= torch.arange(first, stop, device=at.device)[:, None])
    if window is not None:
        visible = visible & (at[:, None] > own - window)
    visible = visible[:, None]  # (1 or kv_heads, 1, rows, slots)
    keys, values = keys[:, start:stop], values[:, start:stop]
    if softcap is None:
        keys, values = (t[:, None].expand(-1, group, -1, -1) for t in (keys, values))
        output = sdpa(query, keys, values, attn_mask=visible, scale=scale)
    else:
        logits = torch.einsum("kgrd,knd->kgrn", query.float(), keys.float()) * scale
        logits = (softcap * torch.tanh(logits / softcap)).masked_fill(~visible, float("-inf"))
        output = torch.einsum("kgrn,knd->kgrd", logits.softmax(-1), values.float()).to(query.dtype)
    return output.masked_fill((own < 0)[:, None], 0.0)
