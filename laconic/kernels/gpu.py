"""The kernels on the GPU, in triton. Each key is read once for all query heads of its group, from wherever it lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from laconic.kernels.index import QUAD, TILE, ZERO, KeyIndex
from laconic.kernels.parts import combine
from laconic.kernels.ragged import Ragged, dense

CHUNK = 1024  # keys per program of the vote
BLOCK = 64  # keys per step of the inner loop
SIDE = 64  # rows and columns of a tile of the attention map
PROGRAMS = 512  # enough to fill the device


@triton.jit
def _base(bases, pair, b, h, stride_b, stride_h, RAGGED: tl.constexpr):
    """The offset at which slot 0 of a row and head stands: looked up where heads have different lengths, else by stride."""
    if RAGGED:
        return tl.load(bases + pair)
    return b * stride_b + h * stride_h


@triton.jit
def _attend(
    query, keys, values, key_bases, value_bases, index, starts, output, state,
    kv_heads, group, n, splits, scale, softcap,
    key_b, key_h, key_n, value_b, value_h, value_n, index_b, index_h,
    RAGGED: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_CAP: tl.constexpr,
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
    key_base = _base(key_bases, pair, b, h, key_b, key_h, RAGGED)
    value_base = _base(value_bases, pair, b, h, value_b, value_h, RAGGED)
    for at in range(begin, end, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        seen = slot < end
        row = slot.to(tl.int64)
        if HAS_INDEX:
            row = tl.load(index + b * index_b + h * index_h + slot, mask=seen, other=-1)
            seen = row >= 0
        k = tl.load(
            keys + key_base + row[:, None] * key_n + d, mask=seen[:, None] & (d < DIM), other=0.0
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
            values + value_base + row[:, None] * value_n + dv,
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
def _keys_at(
    keys, scales, base, pair, slot, stored, d, key_h, key_n,
    EIGHT_BITS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, QUAD: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """The keys of a row and head at ``slot``, float32: from ``base`` on, or eight-bit ones from the tiles of ``KeyIndex``, of
    which a row and head has ``key_h`` bytes and ``key_n`` scales."""
    there = stored[:, None] & (d < DIM)
    if EIGHT_BITS:
        row = pair.to(tl.int64) * key_h + slot // TILE * (TILE * DIM) + slot % TILE * QUAD
        place = row[:, None] + d // QUAD * (TILE * QUAD) + d % QUAD
        code = tl.load(keys + place, mask=there, other=ZERO).to(tl.float32) - ZERO
        found = code * tl.load(scales + pair.to(tl.int64) * key_n + slot, mask=stored, other=0.0)[:, None]
    else:
        found = tl.load(keys + base + slot[:, None] * key_n + d, mask=there, other=0.0).to(tl.float32)
    return found


@triton.jit
def _vote_chunks(
    query, keys, key_bases, scales, starts, weights, tops, sums,
    kv_heads, group, n, stop, chunks, scale, softcap, key_b, key_h, key_n,
    EIGHT_BITS: tl.constexpr, RAGGED: tl.constexpr, HAS_CAP: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK_N: tl.constexpr, TILE: tl.constexpr, QUAD: tl.constexpr, ZERO: tl.constexpr,
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
    key_base = _base(key_bases, pair, b, h, key_b, key_h, RAGGED)
    for at in range(chunk * CHUNK_N, (chunk + 1) * CHUNK_N, BLOCK_N):
        slot = (at + tl.arange(0, BLOCK_N)).to(tl.int64)
        seen = (slot >= first) & (slot < stop)
        k = _keys_at(keys, scales, key_base, pair, slot, seen, d, key_h, key_n, EIGHT_BITS, DIM, TILE, QUAD, ZERO)
        logits = tl.sum(q[:, None, :] * k[None, :, :], axis=2) * scale
        if HAS_CAP:
            logits = softcap * (2 / (1 + tl.exp(-2 * logits / softcap)) - 1)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        top = higher
        tl.store(weights + heads[:, None] * n + slot, logits, mask=(g[:, None] < group) & (slot < n))
    tl.store(tops + heads * chunks + chunk, top, mask=g < group)
    tl.store(sums + heads * chunks + chunk, total, mask=g < group)


@triton.jit
def _logit_chunks(
    query, keys, key_bases, scales, starts, index, logits,
    kv_heads, group, n, scale, key_b, key_h, key_n, index_b, index_h,
    EIGHT_BITS: tl.constexpr, RAGGED: tl.constexpr, HAS_INDEX: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, QUAD: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Logits of GROUP heads and BLOCK_N keys, all or those of ``index``; -inf for an empty slot."""
    pair = tl.program_id(0)
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    g, d = tl.arange(0, GROUP), tl.arange(0, PAD_DIM)
    heads = pair.to(tl.int64) * group + g
    slot = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    seen, row = slot < n, slot
    if HAS_INDEX:
        row = tl.load(index + b * index_b + h * index_h + slot, mask=seen, other=-1)
        seen = row >= 0
    stored = seen & (row >= tl.load(starts + pair))
    key_base = _base(key_bases, pair, b, h, key_b, key_h, RAGGED)
    q = tl.load(query + heads[:, None] * DIM + d, mask=(g[:, None] < group) & (d < DIM), other=0.0).to(tl.float32)
    k = _keys_at(keys, scales, key_base, pair, row, stored, d, key_h, key_n, EIGHT_BITS, DIM, TILE, QUAD, ZERO)
    product = tl.where(seen[None, :], tl.sum(q[:, None, :] * k[None, :, :], axis=2) * scale, float("-inf"))
    tl.store(logits + heads[:, None] * n + slot, product, mask=(g[:, None] < group) & (slot < n))


@triton.jit
def _map_block(
    query, keys, positions, b, head, h, rows, slots, count, n, first, window, scale, softcap,
    query_b, query_h, query_m, key_b, key_h, key_n, position_b, position_h,
    HAS_WINDOW: tl.constexpr, HAS_GAPS: tl.constexpr, HAS_CAP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr,
):  # fmt: skip
    """Logits of a block of the attention map, (query rows, slots), -inf where a row does not see a slot."""
    d = tl.arange(0, PAD_DIM)
    q = tl.load(
        query + b * query_b + head * query_h + rows[:, None] * query_m + d,
        mask=(rows[:, None] < count) & (d < DIM), other=0.0,
    ).to(tl.float32)  # fmt: skip
    k = tl.load(
        keys + b * key_b + h * key_h + slots[:, None] * key_n + d, mask=(slots[:, None] < n) & (d < DIM), other=0.0
    ).to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_CAP:
        logits = softcap * (2 / (1 + tl.exp(-2 * logits / softcap)) - 1)
    at = (n - count + rows)[:, None]  # the slot of a row's own token
    seen = (slots[None, :] <= at) & (slots[None, :] >= first) & (at >= first) & (rows[:, None] < count)
    if HAS_GAPS:
        own = positions + b * position_b + h * position_h
        since = tl.load(own + n - count + rows, mask=rows < count, other=0)[:, None] - window
        seen = seen & (tl.load(own + slots, mask=slots < n, other=0)[None, :] > since)
    elif HAS_WINDOW:
        seen = seen & (slots[None, :] > at - window)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _row_lse(
    query, keys, positions, starts, lse, heads, group, count, n, window, scale, softcap,
    query_b, query_h, query_m, key_b, key_h, key_n, position_b, position_h,
    HAS_WINDOW: tl.constexpr, HAS_GAPS: tl.constexpr, HAS_CAP: tl.constexpr,
    DIM: tl.constexpr, PAD_DIM: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Log of the softmax denominator of SIDE rows of one query head; +inf for a row that sees nothing."""
    pair = tl.program_id(0)
    b, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    h = head // group
    first = tl.load(starts + b * (heads // group) + h)
    rows = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    top = tl.full((SIDE,), float("-inf"), tl.float32)
    total = tl.zeros((SIDE,), tl.float32)
    begin = tl.maximum(first, 0)
    if HAS_WINDOW:  # which gaps only make narrower
        begin = tl.maximum(begin, n - count + tl.program_id(1) * SIDE - window + 1)
    for at in range(begin // SIDE * SIDE, tl.minimum(n, n - count + (tl.program_id(1) + 1) * SIDE), SIDE):
        slots = (at + tl.arange(0, SIDE)).to(tl.int64)
        logits = _map_block(
            query, keys, positions, b, head, h, rows, slots, count, n, first, window, scale, softcap,
            query_b, query_h, query_m, key_b, key_h, key_n, position_b, position_h,
            HAS_WINDOW, HAS_GAPS, HAS_CAP, DIM, PAD_DIM,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        top = higher
    value = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-38)), float("inf"))
    tl.store(lse + pair.to(tl.int64) * count + rows, value, mask=rows < count)


@triton.jit
def _columns(
    query, keys, positions, starts, lse, sums, heads, group, count, n, window, scale, softcap,
    query_b, query_h, query_m, key_b, key_h, key_n, position_b, position_h,
    HAS_WINDOW: tl.constexpr, HAS_GAPS: tl.constexpr, HAS_CAP: tl.constexpr,
    DIM: tl.constexpr, PAD_DIM: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Attention that SIDE slots receive from all rows of one query head."""
    pair = tl.program_id(0)
    b, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    h = head // group
    first = tl.load(starts + b * (heads // group) + h)
    slots = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    received = tl.zeros((SIDE,), tl.float32)
    begin = tl.maximum(tl.program_id(1) * SIDE - (n - count), 0)  # rows above the diagonal see none of the slots
    end = count
    if HAS_WINDOW:
        end = tl.minimum(count, (tl.program_id(1) + 1) * SIDE + window - (n - count))
    for row in range(begin // SIDE * SIDE, end, SIDE):
        rows = (row + tl.arange(0, SIDE)).to(tl.int64)
        logits = _map_block(
            query, keys, positions, b, head, h, rows, slots, count, n, first, window, scale, softcap,
            query_b, query_h, query_m, key_b, key_h, key_n, position_b, position_h,
            HAS_WINDOW, HAS_GAPS, HAS_CAP, DIM, PAD_DIM,
        )  # fmt: skip
        whole = tl.load(lse + pair.to(tl.int64) * count + rows, mask=rows < count, other=float("inf"))
        received += tl.sum(tl.exp(logits - whole[:, None]), axis=0)
    tl.store(sums + pair.to(tl.int64) * n + slots, received, mask=slots < n)


def _run(query, keys, values, index, starts, n, scale, softcap):
    batch, kv_heads = keys.shape[:2]
    group, value_dim = query.shape[1] // kv_heads, values.shape[-1]
    padded = max(2, triton.next_power_of_2(group))
    splits = max(1, min(PROGRAMS // (batch * kv_heads), n // (4 * BLOCK)))
    output = torch.empty(batch, kv_heads, splits, padded, value_dim, dtype=torch.float32, device=query.device)
    state = torch.empty(batch, kv_heads, splits, padded, 2, dtype=torch.float32, device=query.device)
    (keys_at, key_bases), (values_at, value_bases) = _memory(keys), _memory(values)
    _attend[(batch * kv_heads, splits)](
        query.contiguous(), keys_at, values_at, key_bases, value_bases, index, starts, output, state,
        kv_heads, group, n, splits, scale, softcap or 1.0,
        *_strides(keys), *_strides(values), *_per_head(index),
        RAGGED=isinstance(keys, Ragged), HAS_INDEX=index is not None, HAS_CAP=softcap is not None,
        GROUP=padded, DIM=keys.shape[-1], VALUE_DIM=value_dim, BLOCK_N=BLOCK, PAD_DIM=triton.next_power_of_2(keys.shape[-1]),
        PAD_VALUE=triton.next_power_of_2(value_dim),
    )  # fmt: skip
    return combine(output, state, query)


def _starts(starts: torch.Tensor | None, keys: torch.Tensor | Ragged) -> torch.Tensor:
    """First slots ``(batch, kv_heads)`` that are visible and stored."""
    none = torch.zeros(1, 1, dtype=torch.int64, device=keys.device)
    first = (none if starts is None else starts).expand(keys.shape[:2])
    return (torch.maximum(first, keys.starts) if isinstance(keys, Ragged) else first).contiguous()


def _memory(tensor: torch.Tensor | Ragged) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where the entries lie, and the offsets of slot 0 per row and head where these are no matter of strides."""
    if isinstance(tensor, Ragged):
        return tensor.data, (tensor.bases * tensor.data.stride(0)).contiguous()
    return tensor, None


def _strides(tensor: torch.Tensor | Ragged) -> tuple[int, int, int]:
    return (0, 0, tensor.data.stride(0)) if isinstance(tensor, Ragged) else tensor.stride()[:3]


def _per_head(numbers: torch.Tensor | None) -> tuple[int, int]:
    """Strides over rows and KV heads of ``(batch, kv_heads or 1, n)``, contiguous."""
    return (0, 0) if numbers is None else (numbers.stride(0), numbers.stride(1) if numbers.shape[1] > 1 else 0)


def _in_bytes(index: KeyIndex, starts: torch.Tensor | None) -> tuple[tuple, tuple[int, int, int], tuple[int, int, int, int]]:
    """Memory, strides (none, bytes and scales of a row and head) and shape of 8-bit keys."""
    batch, kv_heads, capacity = index.scales.shape
    dim = index.data.shape[3] * QUAD
    memory = (index.data, None, index.scales, _starts(starts, index.scales))
    return memory, (0, capacity * dim, capacity), (batch, kv_heads, index.n, dim)


def decode_attention(query, keys, values, *, scale, starts=None, softcap=None):
    return _run(query, keys, values, None, _starts(starts, keys), keys.shape[2], scale, softcap)


def selected_attention(query, keys, values, indices, *, scale, softcap=None):
    if isinstance(keys, Ragged):
        indices = indices.expand(-1, keys.shape[1], -1)
        indices = indices.masked_fill(indices < keys.starts[..., None], -1)
    everything = torch.zeros(keys.shape[:2], dtype=torch.int64, device=indices.device)  # the entries are those of ``indices``
    return _run(query, keys, values, indices.contiguous(), everything, indices.shape[-1], scale, softcap)


def vote(query, keys, *, scale, starts=None, stop=None, over="layer", softcap=None):
    keys_at, key_bases = _memory(keys)
    memory = (keys_at, key_bases, None, _starts(starts, keys))
    return _votes(query, memory, _strides(keys), keys.shape, scale, stop, over, softcap, isinstance(keys, Ragged))


def index_vote(query, index, *, scale, starts=None, stop=None, over="layer", softcap=None):
    """As ``vote`` from the 8-bit keys of ``index``: a quarter of the bytes of float32."""
    memory, strides, shape = _in_bytes(index, starts)
    return _votes(query, memory, strides, shape, scale, stop, over, softcap, False)


def _votes(query, memory, strides, shape, scale, stop, over, softcap, ragged):
    keys, bases, scales, starts = memory
    batch, kv_heads, n, dim = shape
    group = query.shape[1] // kv_heads
    stop = n if stop is None else min(stop, n)
    chunks = triton.cdiv(n, CHUNK)
    weights = torch.empty(batch, kv_heads, group, n, dtype=torch.float32, device=query.device)
    tops = torch.empty(batch, kv_heads, group, chunks, dtype=torch.float32, device=query.device)
    sums = torch.empty_like(tops)
    _vote_chunks[(batch * kv_heads, chunks)](
        query.contiguous(), keys, bases, scales, starts, weights, tops, sums,
        kv_heads, group, n, stop, chunks, scale, softcap or 1.0, *strides,
        EIGHT_BITS=scales is not None, RAGGED=ragged, HAS_CAP=softcap is not None,
        GROUP=max(2, triton.next_power_of_2(group)), DIM=dim, PAD_DIM=triton.next_power_of_2(dim), BLOCK_N=BLOCK,
        CHUNK_N=CHUNK, TILE=TILE, QUAD=QUAD, ZERO=ZERO,
    )  # fmt: skip
    best = tops.amax(-1, keepdim=True)
    best = best.masked_fill(best == float("-inf"), 0.0)
    total = ((tops - best).exp() * sums).sum(-1, keepdim=True).clamp(min=1e-38)
    shares = (weights - best).exp() / total
    if over == "head":
        return shares.flatten(1, 2)
    votes = shares.sum(2)
    return votes.sum(1, keepdim=True) if over == "layer" else votes


def logits(query, keys, *, scale=1.0, indices=None):
    keys_at, key_bases = _memory(keys)
    memory = (keys_at, key_bases, None, _starts(None, keys))
    return _products(query, memory, _strides(keys), keys.shape, scale, indices, isinstance(keys, Ragged))


def index_logits(query, index, indices, *, scale=1.0):
    """As ``logits`` of the entries ``indices`` from the 8-bit keys of ``index``."""
    memory, strides, shape = _in_bytes(index, None)
    return _products(query, memory, strides, shape, scale, indices, False)


def _products(query, memory, strides, shape, scale, indices, ragged):
    keys, bases, scales, starts = memory
    batch, kv_heads, n, dim = shape
    group = query.shape[1] // kv_heads
    n = n if indices is None else indices.shape[2]
    out = torch.empty(batch, query.shape[1], n, dtype=torch.float32, device=query.device)
    indices = None if indices is None else indices.contiguous()
    _logit_chunks[(batch * kv_heads, triton.cdiv(n, BLOCK))](
        query.contiguous(), keys, bases, scales, starts, indices, out,
        kv_heads, group, n, scale, *strides, *_per_head(indices),
        EIGHT_BITS=scales is not None, RAGGED=ragged, HAS_INDEX=indices is not None,
        GROUP=max(2, triton.next_power_of_2(group)), DIM=dim, PAD_DIM=triton.next_power_of_2(dim), BLOCK_N=BLOCK,
        TILE=TILE, QUAD=QUAD, ZERO=ZERO,
    )  # fmt: skip
    return out


def column_sums(query, keys, *, scale, starts=None, window=None, softcap=None, positions=None):
    """In two passes over the tiles of the map, none of which is stored: the rows' denominators, then the columns."""
    starts, keys = _starts(starts, keys), dense(keys)
    batch, heads, count, dim = query.shape
    n, group = keys.shape[2], heads // keys.shape[1]
    positions = None if window is None or positions is None else positions.contiguous()
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch, heads, n, dtype=torch.float32, device=query.device)
    sizes = (heads, group, count, n, window or 0, scale, softcap or 1.0)
    sizes += (*query.stride()[:3], *keys.stride()[:3], *_per_head(positions))
    options = {
        "HAS_WINDOW": window is not None, "HAS_GAPS": positions is not None, "HAS_CAP": softcap is not None, "DIM": dim,
        "PAD_DIM": max(16, triton.next_power_of_2(dim)), "SIDE": SIDE,
    }  # fmt: skip
    _row_lse[(batch * heads, triton.cdiv(count, SIDE))](query, keys, positions, starts, lse, *sizes, **options)
    _columns[(batch * heads, triton.cdiv(n, SIDE))](query, keys, positions, starts, lse, sums, *sizes, **options)
    return sums
