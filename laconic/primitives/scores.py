"""What each token is worth. All are computed without an n x n attention map."""

from __future__ import annotations

import torch

from laconic import kernels
from laconic.primitives.reduce import group


def attention_received(
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    starts: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    reduce: str = "mean",
) -> torch.Tensor:
    """Causal attention probability that each key receives from the given queries, summed over them.

    Args:
        query: ``(batch, heads, rows, head_dim)``, the last ``rows`` positions of the keys.
        keys: ``(batch, kv_heads, n, head_dim)``.
        reduce: query heads to KV heads: mean, max or sum.

    Returns:
        float32 ``(batch, kv_heads, n)``.
    """
    columns = kernels.column_sums(query, keys, scale=scale, starts=starts, window=window, softcap=softcap)
    return group(columns, keys.shape[1], reduce)


def key_norm(keys: torch.Tensor) -> torch.Tensor:
    """Minus the Euclidean norm of each key, float32 ``(batch, kv_heads, n)``: small keys draw the most attention
    (A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, 2024)."""
    return -keys.float().norm(dim=-1)


def hashed_uniform(positions: torch.Tensor, seed: int) -> torch.Tensor:
    """A number in [0, 1) for each position, head and seed, float32 of the shape of ``positions`` (batch, heads, n).

    The same position always gets the same number, so that random choices are nested and repeatable.
    """
    heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
    x = positions * 2654435761 + heads * 40503 + (seed % 2**31 + 1) * 97531
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = (((x >> 16) ^ x) * multiplier) & 0xFFFFFFFF
    return (((x >> 16) ^ x) & 0xFFFFFF).float() / float(1 << 24)
