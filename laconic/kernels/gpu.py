"""The kernels on the GPU, in triton. Each key is read once for all query heads of its group, from wherever it lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from laconic.kernels.parts import combine

CHUNK = 1024  # keys per program of the vote
BLOCK = 64  # keys per step of the inner loop
PROGRAMS = 512  # enough to fill the device


@triton.jit
def _attend(
    query, keys, values, index, starts, output, state,
    kv_heads, group, n, splits, scale, softcap,
    key_b, key_h, key_n, value_b, value_h, value_n, index_b, index_h,
    HAS_INDEX: tl.constexpr, HAS_CAP: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    PAD_DIM: tl.constexpr, PAD_VALUE: tl.constexpr,
):  # fmt: skip
    """One split of one KV head: running maximum, sum and weighted values of GROUP query heads over its share of the keys."""
    pair, split = tl.program_id(0), tl.program_id(1)
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    first = tl.load(starts + pair)
    length = tl.cdiv(n - first, splits)
    begin = first + split * length
    end = tl.minimum(n, begin + length)
    g, d, dv = tl.arange(0, GROUP), tl.arange(0, PAD_DIM), tl.arange(0, PAD_VALUE)
    heads = pair.to(tl.int64) * group + g
    q = tl.load(query + heads[:, None] * DIM + d, mask=(g[:, None] < group) & (d < DIM), other=0.0).to(tl.float32)
    top = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, PAD_VALUE), tl.float32)
    for at in range(begin, end, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        seen = slot < end
        row = slot.to(tl.int64)
        if HAS_INDEX:
            row = tl.load(index + b * index_b + h * index_h + slot, mask=seen, other=-1)
            seen = row >= 0
        k = tl.load(
            keys + b * key_b + h * key_h + row[:, None] * key_n + d, mask=seen[:, None] & (d < DIM), other=0.0
        ).to(tl.float32)
        logits = tl.sum(q[:, None, :] * k[None, :, :], axis=2) * scale
        if HAS_CAP:
            logits = softcap * (2 / (1 + tl.exp(-2 * logits / softcap)) - 1)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - safe)
        weight = tl.exp(logits - safe[:, None])
        v = tl.load(
            values + b * value_b + h * value_h + row[:, None] * value_n + dv,
            mask=seen[:, None] & (dv < VALUE_DIM), other=0.0,
        ).to(tl.float32)  # fmt: skip
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * v[None, :, :], axis=1)
        total = total * shrink + tl.sum(weight, axis=1)
        top = higher
    place = (pair.to(tl.int64) * splits + split) * GROUP + g
    tl.store(output + place[:, None] * VALUE_DIM + dv, acc, mask=dv < VALUE_DIM)
    tl.store(state + place * 2, top)
    tl.store(state + place * 2 + 1, total)


@triton.jit
def _vote_chunks(
    query, keys, starts, weights, tops, sums,
    kv_heads, group, n, stop, chunks, scale, key_b, key_h, key_n,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of keys: logits of GROUP heads, and per head their top and the sum of exp(logit - top)."""
    pair, chunk = tl.program_id(0), tl.program_id(1)
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    first = tl.load(starts + pair)
    g, d = tl.arange(0, GROUP), tl.arange(0, PAD_DIM)
    heads = pair.to(tl.int64) * group + g
    q = tl.load(query + heads[:, None] * DIM + d, mask=(g[:, None] < group) & (d < DIM), other=0.0).to(tl.float32)
    top = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    for at in range(chunk * CHUNK_N, (chunk + 1) * CHUNK_N, BLOCK_N):
        slot = (at + tl.arange(0, BLOCK_N)).to(tl.int64)
        seen = (slot >= first) & (slot < stop)
        k = tl.load(
            keys + b * key_b + h * key_h + slot[:, None] * key_n + d, mask=seen[:, None] & (d < DIM), other=0.0
        ).to(tl.float32)
        logits = tl.sum(q[:, None, :] * k[None, :, :], axis=2) * scale
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        top = higher
        tl.store(weights + heads[:, None] * n + slot, logits, mask=(g[:, None] < group) & (slot < n))
    tl.store(tops + heads * chunks + chunk, top, mask=g < group)
    tl.store(sums + heads * chunks + chunk, total, mask=g < group)


def _run(query, keys, values, index, starts, n, scale, softcap):
    batch, kv_heads = keys.shape[:2]
    group, value_dim = query.shape[1] // kv_heads, values.shape[-1]
    padded = max(2, triton.next_power_of_2(group))
    splits = max(1, min(PROGRAMS // (batch * kv_heads), n // (4 * BLOCK)))
    output = torch.empty(batch, kv_heads, splits, padded, value_dim, dtype=torch.float32, device=query.device)
    state = torch.empty(batch, kv_heads, splits, padded, 2, dtype=torch.float32, device=query.device)
    index_strides = (0, 0) if index is None else (index.stride(0), index.stride(1) if index.shape[1] > 1 else 0)
    _attend[(batch * kv_heads, splits)](
        query.contiguous(), keys, values, index, _starts(starts, keys), output, state,
        kv_heads, group, n, splits, scale, softcap or 1.0,
        *keys.stride()[:3], *values.stride()[:3], *index_strides,
        HAS_INDEX=index is not None, HAS_CAP=softcap is not None, GROUP=padded, DIM=keys.shape[-1],
        VALUE_DIM=value_dim, BLOCK_N=BLOCK, PAD_DIM=triton.next_power_of_2(keys.shape[-1]),
        PAD_VALUE=triton.next_power_of_2(value_dim),
    )  # fmt: skip
    return combine(output, state, query)


def _starts(starts: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    if starts is None:
        return torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
    return starts.expand(keys.shape[:2]).contiguous()


def decode_attention(query, keys, values, *, scale, starts=None, softcap=None):
    return _run(query, keys, values, None, starts, keys.shape[2], scale, softcap)


def selected_attention(query, keys, values, indices, *, scale, softcap=None):
    return _run(query, keys, values, indices.contiguous(), None, indices.shape[-1], scale, softcap)


def vote(query, keys, *, scale, starts=None, stop=None, over="layer"):
    batch, kv_heads, n, dim = keys.shape
    group = query.shape[1] // kv_heads
    stop = n if stop is None else min(stop, n)
    chunks = triton.cdiv(n, CHUNK)
    weights = torch.empty(batch, kv_heads, group, n, dtype=torch.float32, device=query.device)
    tops = torch.empty(batch, kv_heads, group, chunks, dtype=torch.float32, device=query.device)
    sums = torch.empty_like(tops)
    _vote_chunks[(batch * kv_heads, chunks)](
        query.contiguous(), keys, _starts(starts, keys), weights, tops, sums,
        kv_heads, group, n, stop, chunks, scale, *keys.stride()[:3],
        GROUP=max(2, triton.next_power_of_2(group)), DIM=dim, PAD_DIM=triton.next_power_of_2(dim),
        BLOCK_N=BLOCK, CHUNK_N=CHUNK,
    )  # fmt: skip
    best = tops.amax(-1, keepdim=True)
    best = best.masked_fill(best == float("-inf"), 0.0)
    total = ((tops - best).exp() * sums).sum(-1, keepdim=True).clamp(min=1e-38)
    votes = ((weights - best).exp() / total).sum(2)
    return votes.sum(1, keepdim=True) if over == "layer" else votes
