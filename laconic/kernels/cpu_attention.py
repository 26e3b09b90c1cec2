"""Attention of one query per row on the CPU: each key and value is read once for all query heads of its group.

Flash-decoding (Dao et al., 2023): the entries are split among threads, and the parts are merged by their maxima and sums.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import torch

from laconic.errors import LaconicError
from laconic.kernels.cpu_common import (
    NEGATIVE,
    cap,
    first_slots,
    flat,
    grouped,
    jit,
    largest,
    padded_rows,
    row_logits,
    soften,
    span_rows,
    use_threads,
)  # fmt: skip
from laconic.kernels.parts import combine
from laconic.kernels.ragged import Ragged
from laconic.kernels.simd import HEADS, LANES, ROWS, add_rows, as_float

BLOCK = 2048  # keys whose logits are held at a time: long runs through keys, then values, are read at full speed
SPLIT = 512  # entries that are worth a part of their own
CACHED = 4 << 20  # bytes that a processor keeps at hand: below, starting takes longer than reading


@jit()
def _add_values(weights, values, rows, count, output):
    """output (group, dim) += weights (group, count) @ values; weights beyond ``count`` up to a multiple of four are 0."""
    group, dim = output.shape
    for j in range(0, count, ROWS):
        for g in range(0, group, HEADS):
            add_rows(weights, g, values, rows, j, output)
    if dim % LANES:
        for j in range(count):
            for g in range(group):
                for i in range(dim // LANES * LANES, dim):
                    output[g, i] += weights[g, j] * as_float(values[rows[j] + i])


@jit()
def _soften_block(logits, count, softcap, output, state):
    """Logits become weights relative to the running maximum, by which output (group, dim) and state (group, 2) are kept."""
    for g in range(logits.shape[0]):
        row = logits[g, :count]
        if softcap > 0:
            cap(row, softcap)
        before = state[g, 0]
        top = largest(row, before)
        if top > before:
            shrink = np.float32(np.exp(before - top)) if state[g, 1] > 0 else np.float32(0.0)
            state[g, 0], state[g, 1] = top, state[g, 1] * shrink
            for i in range(output.shape[1]):
                output[g, i] *= shrink
        state[g, 1] += soften(row, top)
        for j in range(count, -(-count // ROWS) * ROWS):
            logits[g, j] = np.float32(0.0)


@jit()
def _fill_rows(index, position, end, base, stride, rows):
    """Offsets of up to BLOCK entries from ``position`` on, and what ``dots`` wants after them; count, and what is next."""
    if index.shape[0] == 0:
        count = min(BLOCK, end - position)
        span_rows(base + position * stride, count, stride, rows)
        return count, position + count
    count = 0
    while position < end and count < BLOCK:
        slot = index[position]
        position += 1
        if slot >= 0:
            rows[count] = base + slot * stride
            count += 1
    for j in range(count, padded_rows(count)):
        rows[j] = rows[count - 1]
    return count, position


@jit()
def _part(query, keys, values, key_at, value_at, index, begin, end, scale, softcap, output, state):
    """Attention of ``query`` (group, d) over entries ``begin..end-1`` (or index[begin..end-1]) of flat keys and values.

    ``key_at``, ``value_at``: the offset of slot 0 and the stride from slot to slot.
    The group is a multiple of four. Writes the unnormalised output (group, dv) and the state (group, 2): running maximum
    and sum.
    """
    logits = np.empty((query.shape[0], BLOCK), np.float32)
    key_rows, value_rows = np.empty(padded_rows(BLOCK), np.int64), np.empty(padded_rows(BLOCK), np.int64)
    state[:, 0], state[:, 1] = NEGATIVE, np.float32(0.0)
    output[:] = np.float32(0.0)
    position = begin
    while position < end:
        _fill_rows(index, position, end, value_at[0], value_at[1], value_rows)
        count, position = _fill_rows(index, position, end, key_at[0], key_at[1], key_rows)
        if count == 0:
            break
        row_logits(query, keys, key_rows, count, scale, logits, 0)
        _soften_block(logits, count, softcap, output, state)
        _add_values(logits, values, value_rows, count, output)


@jit(parallel=True)
def _attend(
    query, keys, values, key_bases, value_bases, strides, index, starts, n, share, splits, scale, softcap, output, state
):
    """All rows and KV heads in parts of about ``share`` entries, ``splits`` at most: output (batch, kv_heads, splits, group, dv)
    and state (..., group, 2)."""
    kv_heads = query.shape[1]
    pairs = query.shape[0] * kv_heads
    for job in nb.prange(pairs * splits):
        part, pair = divmod(np.int64(job), pairs)  # the first parts of all heads first: a thread gets some of each long head
        b, h = divmod(pair, kv_heads)
        held = n - starts[b, h]
        parts = max(1, held // share)
        length = (held + parts - 1) // parts
        begin = starts[b, h] + part * length
        end = min(n, begin + length)
        chosen = index[min(b, index.shape[0] - 1), min(h, index.shape[1] - 1)]
        _part(
            query[b, h], keys, values, (key_bases[b, h], strides[0]), (value_bases[b, h], strides[1]), chosen, begin, end,
            scale, softcap, output[b, h, part], state[b, h, part],
        )  # fmt: skip
        if splits == 1:
            _finish(output[b, h, 0], state[b, h, 0])


@jit()
def _finish(output, state):
    """What ``parts.combine`` does, for a single part: output is normalised, and state[:, 0] becomes the lse."""
    for g in range(output.shape[0]):
        total = state[g, 1]
        share = np.float32(1.0) / total if total > 0 else np.float32(0.0)
        state[g, 0] = state[g, 0] + np.float32(np.log(total)) if total > 0 else NEGATIVE
        for i in range(output.shape[1]):
            output[g, i] *= share


def _run(query, keys, values, index, starts, n, scale, softcap):
    groups = grouped(query, keys.shape[1])
    first = int(starts.min())
    entries = starts.size * n if first == int(starts.max()) == 0 else int((n - starts).clip(0).sum())
    threads = use_threads(entries * (keys.shape[-1] + values.shape[-1]) * keys.element_size())
    share = max(SPLIT, -(-entries // (4 * threads)) if threads > 1 else entries)
    splits = max(1, (n - first) // share)
    flat_keys, key_bases, key_stride = flat(keys)
    flat_values, value_bases, value_stride = flat(values)
    output = np.empty((*groups.shape[:2], splits, groups.shape[2], values.shape[-1]), np.float32)
    state = np.empty((*output.shape[:4], 2), np.float32)
    _attend(
        groups, flat_keys, flat_values, key_bases, value_bases, (key_stride, value_stride), index, starts, n, share, splits,
        np.float32(scale), np.float32(softcap or 0.0), output, state,
    )  # fmt: skip
    if splits > 1:
        return combine(torch.from_numpy(output), torch.from_numpy(state), query)
    group = query.shape[1] // keys.shape[1]
    whole = torch.from_numpy(output)[:, :, 0, :group].reshape(*query.shape[:2], -1)
    return whole.to(query.dtype), torch.from_numpy(state)[:, :, 0, :group, 0].reshape(query.shape[:2])


def _in_one_call(query, keys, values, scale):
    """Attention by torch's fused kernel: it starts at once, but reads memory more slowly than ``_attend``."""
    batch, heads, dim = query.shape
    groups = query.reshape(batch, keys.shape[1], -1, dim)  # queries of a KV head stand as rows, so that no key is repeated
    output, lse = torch._scaled_dot_product_flash_attention_for_cpu(groups, keys, values, scale=scale)
    return output.reshape(batch, heads, -1), lse.reshape(batch, heads)


def decode_attention(query, keys, values, *, scale, starts=None, softcap=None):
    if starts is None and not softcap and not isinstance(keys, Ragged) and keys.shape == values.shape:
        size = 2 * keys.numel() * keys.element_size()
        if 0 < size <= CACHED:
            return _in_one_call(query, keys, values, scale)
    none = np.empty((1, 1, 0), np.int64)
    return _run(query, keys, values, none, first_slots(starts, keys), keys.shape[2], scale, softcap)


def selected_attention(query, keys, values, indices, *, scale, softcap=None):
    index = np.ascontiguousarray(indices.numpy())
    if index.size and index.max() >= keys.shape[2]:
        raise LaconicError(f"selected_attention: entry {index.max()} is not among the {keys.shape[2]} held.")
    if isinstance(keys, Ragged):
        index = np.where(index < first_slots(None, keys)[..., None], -1, index)
    nothing = np.zeros(tuple(keys.shape[:2]), np.int64)
    return _run(query, keys, values, index, nothing, index.shape[2], scale, softcap)
