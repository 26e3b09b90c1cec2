"""What each token is worth. All are computed without an n x n attention map."""

from __future__ import annotations

import torch

from laconic import kernels
from laconic.primitives.reduce import group

ROWS = 256  # queries whose attention is held at a time


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits as a model with logit soft-capping has them (Gemma 2, 2024): softcap * tanh(logits / softcap); -inf stays."""
    if softcap is None:
        return logits
    return (softcap * torch.tanh(logits / softcap)).masked_fill(logits == float("-inf"), float("-inf"))


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


def full_attention_received(query: torch.Tensor, keys: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Attention that each key receives from all queries of an encoder, where every token sees every other.

    Args:
        query, keys: ``(batch, heads, n, head_dim)``.

    Returns:
        float32 ``(batch, n)``: summed over the queries, mean over the heads; 1 everywhere where attention is even.
    """
    batch, heads, n, _ = query.shape
    total = torch.zeros(batch, n, device=query.device)
    turned = keys.transpose(-1, -2)
    for row in range(batch):  # a block of one picture's rows at a time, in memory that stays warm
        for head in range(heads):
            for begin in range(0, n, ROWS):
                block = (query[row, head, begin : begin + ROWS] @ turned[row, head]).float().mul_(scale)
                total[row] += block.softmax(-1).sum(0)
    return total / heads


def key_norm(keys: torch.Tensor) -> torch.Tensor:
    """Minus the Euclidean norm of each key, float32 ``(batch, kv_heads, n)``: small keys draw the most attention
    (A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, 2024)."""
    return -keys.float().norm(dim=-1)


def key_novelty(keys: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the cosine of each key with the mean direction of all keys of its head, float32 ``(batch, kv_heads, n)``.

    Keys before ``starts`` (batch, kv_heads) are padding and take no part in the mean (KeyDiff, 2025).
    """
    direction = torch.nn.functional.normalize(keys.float(), dim=-1)
    if starts is not None:
        hidden = torch.arange(keys.shape[2], device=keys.device) < starts[..., None]
        direction = direction.masked_fill(hidden[..., None], 0.0)
    anchor = torch.nn.functional.normalize(direction.sum(2, keepdim=True), dim=-1)
    return -(direction * anchor).sum(-1)


def expected_attention(
    keys: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, *, scale: float, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention that keys can expect from queries of a normal distribution, float32 ``(batch, heads, n)``, summing to 1.

    The mean of exp(scale * q.k) over q ~ N(mean, covariance) is exp(scale * mean.k + scale^2 / 2 * k' covariance k)
    (Expected Attention, 2025).

    Args:
        keys: ``(batch, kv_heads, n, head_dim)``; mean: ``(batch, heads, head_dim)``; covariance: ``(batch, heads, head_dim,
            head_dim)``.
        starts: first visible slot ``(batch, kv_heads)``; keys before it get 0.
    """
    group_size = mean.shape[1] // keys.shape[1]
    logits = []
    for head in range(mean.shape[1]):  # one at a time: a copy of the keys for every query head would be large
        own = keys[:, head // group_size].float()
        linear = own @ mean[:, head, :, None]
        spread = ((own @ covariance[:, head]) * own).sum(-1)
        logits.append(scale * linear[..., 0] + scale**2 / 2 * spread)
    stacked = torch.stack(logits, 1)
    if starts is not None:
        hidden = torch.arange(keys.shape[2], device=keys.device) < starts.repeat_interleave(group_size, 1)[..., None]
        stacked = stacked.masked_fill(hidden, float("-inf"))
    return stacked.softmax(-1).nan_to_num(0.0)


def hashed_uniform(positions: torch.Tensor, seed: int) -> torch.Tensor:
    """A number in [0, 1) for each position, head and seed, float32 of the shape of ``positions`` (batch, heads, n).

    The same position always gets the same number, so that random choices are nested and repeatable.
    """
    heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
    x = positions * 2654435761 + heads * 40503 + (seed % 2**31 + 1) * 97531
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = (((x >> 16) ^ x) * multiplier) & 0xFFFFFFFF
    return (((x >> 16) ^ x) & 0xFFFFFF).float() / float(1 << 24)
