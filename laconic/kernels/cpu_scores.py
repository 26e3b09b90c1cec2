"""Scores of keys on the CPU: the soft vote, the k largest, and the columns of the attention map."""

from __future__ import annotations

import numba as nb
import numpy as np
import torch

from laconic.kernels.cpu_blocks import logits
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
    scratch,
    soften,
    span_rows,
    use_threads,
)  # fmt: skip
from laconic.kernels.parts import factors
from laconic.kernels.ragged import dense
from laconic.kernels.simd import ROWS

CHUNK = 1024  # keys per task of the vote: their logits stay in the first caches
MAP_FLOATS = 1 << 21  # logits that column_sums holds at a time


@jit(parallel=True)
def _vote_chunks(query, keys, bases, stride, starts, stop, scale, softcap, weights, tops, sums):
    """exp(logit - top of its chunk) into ``weights`` (batch, kv_heads, group, any), with tops and sums (..., chunks)."""
    batch, kv_heads, group, _ = query.shape
    chunks = tops.shape[3]
    for job in nb.prange(batch * kv_heads * chunks):
        task = np.int64(job)  # the index of prange is unsigned, which would turn sums into floats
        b, rest = divmod(task, kv_heads * chunks)
        h, chunk = divmod(rest, chunks)
        begin, end = max(chunk * CHUNK, starts[b, h]), min((chunk + 1) * CHUNK, stop)
        if begin < end:
            first = begin // ROWS * ROWS  # so that no four columns reach into the chunk of another thread
            rows = np.empty(padded_rows(CHUNK), np.int64)
            span_rows(bases[b, h] + first * stride, end - first, stride, rows)
            row_logits(query[b, h], keys, rows, end - first, scale, weights[b, h], first)
            for g in range(group):
                row = weights[b, h, g, begin:end]
                if softcap > 0:
                    cap(row, softcap)
                tops[b, h, g, chunk] = largest(row, NEGATIVE)
                sums[b, h, g, chunk] = soften(row, tops[b, h, g, chunk])


@jit()
def _add(row, factor, votes):
    for j in range(votes.shape[0]):
        votes[j] += row[j] * factor


@jit(parallel=True)
def _gather_votes(weights, shares, group, starts, stop, votes):
    """votes (batch, kv_heads or 1, n) = sum over heads of weight times the share of its chunk, (batch, kv_heads, any, chunks)."""
    batch, kv_heads = weights.shape[:2]
    chunks, outputs = shares.shape[3], votes.shape[1]
    for job in nb.prange(batch * outputs * chunks):
        task = np.int64(job)
        b, rest = divmod(task, outputs * chunks)
        o, chunk = divmod(rest, chunks)
        for h in range(o, o + 1 if outputs > 1 else kv_heads):
            begin, end = max(chunk * CHUNK, starts[b, h]), min((chunk + 1) * CHUNK, stop)
            if begin < end:
                for g in range(group):
                    _add(weights[b, h, g, begin:end], shares[b, h, g, chunk], votes[b, o, begin:end])


def vote(query, keys, *, scale, starts=None, stop=None, over="layer", softcap=None):
    kv_heads, n = keys.shape[1:3]
    use_threads(keys.numel() * keys.element_size())
    groups = grouped(query, kv_heads)
    stop = n if stop is None else min(stop, n)
    weights, tops, sums = vote_space(groups.shape[:3], n, stop)
    first = first_slots(starts, keys)
    flat_keys, bases, stride = flat(keys)
    scale, softcap = np.float32(scale), np.float32(softcap or 0.0)
    _vote_chunks(groups, flat_keys, bases, stride, first, stop, scale, softcap, weights, tops, sums)
    return tally(weights, tops, sums, query.shape[1] // kv_heads, first, stop, n, over)


def vote_space(heads: tuple[int, ...], n: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Room for the weights ``(*heads, n and some)``, and tops and sums ``(*heads, chunks)`` of chunks without entries."""
    chunks = max(1, -(-stop // CHUNK))
    tops = np.full((*heads, chunks), NEGATIVE, np.float32)
    return scratch((*heads, -(-n // 16) * 16)), tops, np.zeros_like(tops)


def tally(weights, tops, sums, group, first, stop, n, over):
    """Votes from the weights that the chunks left, float32 ``(batch, 1, kv_heads or heads, n)``."""
    shares = factors(torch.from_numpy(tops), torch.from_numpy(sums)).numpy()
    batch, kv_heads = weights.shape[:2]
    if over == "head":
        votes = torch.zeros(batch, kv_heads, group, n)
        for b, h in np.ndindex(batch, kv_heads):
            begin = int(first[b, h])
            if begin < stop:
                own = torch.from_numpy(shares[b, h, :group]).repeat_interleave(CHUNK, -1)[:, begin:stop]
                torch.mul(torch.from_numpy(weights[b, h, :group, begin:stop]), own, out=votes[b, h, :, begin:stop])
        return votes.flatten(1, 2)
    votes = np.zeros((batch, 1 if over == "layer" else kv_heads, n), np.float32)
    _gather_votes(weights, shares, group, first, stop, votes)
    return torch.from_numpy(votes)


@jit()
def _order(bits):
    """An int64 in 0..2**32-1 that sorts as the float32 with these bits (int32) does; 0 and -0 are the same number."""
    wide = np.int64(bits)
    return wide + 2**31 if wide >= 0 else -1 - wide if wide > -(2**31) else 2**31


@jit()
def _digit(counts, need):
    """The bin in which the ``need``-th largest lies, and how many are still needed from that bin."""
    at = counts.shape[0] - 1
    while counts[at] < need:
        need -= counts[at]
        at -= 1
    return at, need


@jit()
def _kth(row, k, bits):
    """The k-th largest as ``_order`` has it, how many equal to it belong to the k largest, and how many are NaN."""
    bins, missing = 1 << bits, 0
    counts = np.zeros((2, bins), np.int64)  # two, for equal neighbours would wait for each other
    for i in range(row.shape[0]):
        missing += (row[i] & 0x7FFFFFFF) > 0x7F800000
        counts[i & 1, _order(row[i]) >> (32 - bits)] += 1
    digit, need = _digit(counts[0] + counts[1], k)
    left = np.empty(counts[0, digit] + counts[1, digit], np.int64)
    size = 0
    for i in range(row.shape[0]):
        key = _order(row[i])
        if key >> (32 - bits) == digit:
            left[size] = key
            size += 1
    for shift in range(32 - 2 * bits, -bits, -bits):
        low = max(shift, 0)
        counts[0] = 0
        for i in range(size):
            counts[0, (left[i] >> low) & (bins - 1)] += 1
        digit, need = _digit(counts[0], need)
        kept = 0
        for i in range(size):
            if (left[i] >> low) & (bins - 1) == digit:
                left[kept] = left[i]
                kept += 1
        size = kept
    return left[0], need, missing


@jit(parallel=True)
def _topk(scores, k, chosen):
    """Radix selection in every row of ``scores`` (rows, n), the bits of float32, into ``chosen`` (rows, k), ascending.

    Gives the number of NaN; rows that have any are not filled.
    """
    missing = 0
    for job in nb.prange(scores.shape[0]):
        row = scores[job]
        kth, ties, absent = _kth(row, k, 11)
        missing += absent
        if absent == 0:
            size = 0
            for i in range(row.shape[0]):
                key = _order(row[i])
                if key >= kth and (key > kth or ties > 0):
                    ties -= key == kth
                    chosen[job, size] = i
                    size += 1
    return missing


def topk(scores, k):
    """As the reference, without sorting and in three passes; None if any score is NaN."""
    n = scores.shape[-1]
    rows = scores.reshape(-1, n).contiguous().view(torch.int32).numpy()
    use_threads(rows.nbytes)
    chosen = np.empty((rows.shape[0], k), np.int64)
    missing = _topk(rows, k, chosen)
    return None if missing else torch.from_numpy(chosen).view(*scores.shape[:-1], k)


@jit(parallel=True)
def _soften_rows(logits, rows, bounds, softcap, shares):
    """Row r of ``logits`` (group * rows, any) becomes exp(logit - top) within bounds[r % rows], and its share 1 / sum.

    With softcap > 0 the logits are capped before.
    """
    for job in nb.prange(logits.shape[0]):
        low, high = bounds[job % rows, 0], bounds[job % rows, 1]
        shares[job] = np.float32(0.0)
        if low < high:
            row = logits[job, low:high]
            if softcap > 0:
                cap(row, softcap)
            shares[job] = np.float32(1.0) / soften(row, largest(row, NEGATIVE))


@jit(parallel=True)
def _add_columns(weights, rows, bounds, shares, sums):
    """sums (group, columns) += the rows' weights (group * rows, columns) times their shares, within their bounds."""
    width = weights.shape[1]
    blocks = (width + CHUNK - 1) // CHUNK
    for job in nb.prange(sums.shape[0] * blocks):
        g, block = divmod(np.int64(job), blocks)
        for r in range(rows):
            low, high = max(block * CHUNK, bounds[r, 0]), min((block + 1) * CHUNK, bounds[r, 1])
            if low < high:
                _add(weights[g * rows + r, low:high], shares[g * rows + r], sums[g, low:high])


def _one_row(query, keys, scale, starts, window, softcap, positions):
    """The probabilities of a single query, which stands at the last slot."""
    products, n = logits(query, keys, scale=scale), keys.shape[2]
    if softcap is not None:
        products.div_(softcap).tanh_().mul_(softcap)
    first = torch.from_numpy(first_slots(starts, keys))
    if window is not None and positions is None:
        first = first.clamp(min=n - window)
    elif window is not None:
        first = torch.maximum(first, (positions <= positions[:, :, -1:] - window).sum(-1))
    if bool(first.any()):
        hidden = torch.arange(n) < first[..., None]
        products.masked_fill_(hidden.repeat_interleave(query.shape[1] // keys.shape[1], 1), float("-inf"))
    return products.softmax(-1).nan_to_num_(0.0)  # a query of padding attends to nothing


def column_sums(query, keys, *, scale, starts=None, window=None, softcap=None, positions=None):
    batch, heads, count, dim = query.shape
    if count == 1:
        return _one_row(query[:, :, 0], keys, scale, starts, window, softcap, positions)
    keys = dense(keys)
    kv_heads, n = keys.shape[1:3]
    group = heads // kv_heads
    queries = query.detach().reshape(batch, kv_heads, group, count, dim)
    first = first_slots(starts, keys)
    sums = np.zeros((batch, kv_heads, group, n), np.float32)
    step = min(count, max(8, MAP_FLOATS // (group * n)))
    space = torch.from_numpy(scratch((group * step * n,)))
    use_threads(4 * space.numel())
    for b in range(batch):
        for h in range(kv_heads):
            head_keys = keys[b, h].detach().float()
            for begin in range(0, count, step):
                end = min(begin + step, count)
                rows = np.arange(n - count + begin, n - count + end)
                seen = np.zeros_like(rows) if window is None else rows - window + 1
                if window is not None and positions is not None:
                    at = positions[b, h % positions.shape[1]].numpy()
                    seen = np.searchsorted(at, at[rows] - window + 1)
                start, stop = max(0, int(seen[0])), n - count + end  # nothing above the diagonal is computed
                low = np.maximum(first[b, h], seen)
                low = np.where(rows < first[b, h], rows + 1, low)  # rows of padding attend to nothing
                bounds = np.stack([np.maximum(low - start, 0), rows + 1 - start], 1)
                part = space[: group * (end - begin) * (stop - start)].view(-1, stop - start)
                torch.mm(
                    queries[b, h, :, begin:end].float().reshape(-1, dim) * scale, head_keys[start:stop].T, out=part
                )
                logits, shares = part.numpy(), np.empty(part.shape[0], np.float32)
                _soften_rows(logits, end - begin, bounds, np.float32(softcap or 0.0), shares)
                _add_columns(logits, end - begin, bounds, shares, sums[b, h, :, start:stop])
    return torch.from_numpy(sums).view(batch, heads, n)
