"""The kernels on the CPU, in numba: each key row is read once for all query heads of its group, from wherever it lies.

Arrays come in flat, with strides in elements: a slice of a flat array is contiguous to the compiler, which can then use
SIMD; a strided view of four dimensions is not.
"""

from __future__ import annotations

import llvmlite.ir as ir
import numba as nb
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic

from laconic.kernels.parts import combine, factors

BLOCK = 32  # keys whose logits are held at a time
CHUNK = 1024  # keys per task of the vote
THREAD_BYTES = 2 << 20  # what a thread has to read to be worth waking: below this, waking takes longer than reading
NEGATIVE = np.float32(-np.inf)
_OPTIONS = {"fastmath": {"nsz", "arcp", "contract", "afn", "reassoc"}, "nogil": True, "cache": True}


@intrinsic
def _as_float(context, value):
    """A stored element as float32: float32 as it is, bfloat16 (its bits, uint16) moved to the upper half."""

    def generate(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        if signature.args[0] == types.int8:
            return builder.sitofp(args[0], context.get_value_type(types.float32))
        word = context.get_value_type(types.uint32)
        wide = builder.shl(builder.zext(args[0], word), word(16))
        return builder.bitcast(wide, context.get_value_type(types.float32))

    return types.float32(value), generate


@intrinsic
def _power_of_two(context, exponent):
    """2 ** exponent for an int32 in the range of float32, by writing the exponent bits."""

    def generate(context, builder, signature, args):
        word = context.get_value_type(types.int32)
        bits = builder.shl(builder.add(args[0], word(127)), word(23))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def _prefetch(context, address):
    """Asks for the cache line at ``address`` (int64) and does not wait for it."""

    def generate(context, builder, signature, args):
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], pointer), word(0), word(3), word(1)])  # read, keep, data
        return context.get_dummy_value()

    return types.void(types.int64), generate


@nb.njit(inline="always", **_OPTIONS)
def _exp(x):
    """exp for x <= 0 to about 2e-7 relative, of plain arithmetic so that loops over it become SIMD."""
    t = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
    whole = np.int32(t - np.float32(0.5))  # towards zero: t is not positive, so this is the nearest integer
    f = (t - np.float32(whole)) * np.float32(0.6931471805599453)
    p = np.float32(1 / 5040)
    p = p * f + np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    return p * _power_of_two(whole)


@nb.njit(**_OPTIONS)
def _four_logits(query, head, row, scale, logits, column):
    """logits[head..head+3, column] = scale * q.k for four query heads, so that the key is read once for them."""
    a, b, c, d = query[head], query[head + 1], query[head + 2], query[head + 3]
    sa = sb = sc = sd = np.float32(0.0)
    for i in range(row.shape[0]):
        x = _as_float(row[i])
        sa += x * a[i]
        sb += x * b[i]
        sc += x * c[i]
        sd += x * d[i]
    logits[head, column], logits[head + 1, column] = sa * scale, sb * scale
    logits[head + 2, column], logits[head + 3, column] = sc * scale, sd * scale


@nb.njit(**_OPTIONS)
def _four_sums(weights, head, column, row, output):
    """output[head..head+3] += weight * value for four query heads, so that the value is read once for them."""
    a, b, c, d = output[head], output[head + 1], output[head + 2], output[head + 3]
    wa, wb = weights[head, column], weights[head + 1, column]
    wc, wd = weights[head + 2, column], weights[head + 3, column]
    for i in range(row.shape[0]):
        x = _as_float(row[i])
        a[i] += wa * x
        b[i] += wb * x
        c[i] += wc * x
        d[i] += wd * x


@nb.njit(**_OPTIONS)
def _rescale(logits, state, output, softcap):
    """Logits become exp(logit - maximum so far); the running state and output move to that maximum."""
    if softcap > 0:
        for j in range(logits.shape[0]):
            logits[j] = softcap * np.tanh(logits[j] / softcap)
    top = state[0]
    for j in range(logits.shape[0]):
        top = max(top, logits[j])
    if logits.shape[0] and top > state[0]:
        shrink = np.float32(np.exp(state[0] - top)) if state[1] > 0 else np.float32(0.0)
        state[0], state[1] = top, state[1] * shrink
        for i in range(output.shape[0]):
            output[i] *= shrink
    total = np.float32(0.0)
    for j in range(logits.shape[0]):
        logits[j] = _exp(logits[j] - top)
        total += logits[j]
    state[1] += total


@nb.njit(**_OPTIONS)
def _fetch(array, begin, count):
    """Starts to load elements begin..begin+count-1: rows lie too far apart for the processor to guess the next."""
    line = np.int64(array.ctypes.data) + begin * array.itemsize
    for offset in range(0, count * array.itemsize, 64):
        _prefetch(line + offset)


@nb.njit(**_OPTIONS)
def _part(query, keys, values, key_stride, value_stride, index, begin, end, scale, softcap, output, state):
    """Attention of ``query`` (group, d) over rows ``begin..end-1`` (or index[begin..end-1]) of flat keys and values.

    The group is a multiple of four. Writes the unnormalised output (group, dv) and the state (group, 2): running maximum
    and sum.
    """
    group, dim = query.shape
    value_dim = output.shape[1]
    logits = np.empty((group, BLOCK), np.float32)
    rows = np.empty(BLOCK, np.int64)
    state[:, 0], state[:, 1] = NEGATIVE, np.float32(0.0)
    output[:] = np.float32(0.0)
    at = begin
    while at < end:
        count = 0
        while at < end and count < BLOCK:
            row = at if index.shape[0] == 0 else index[at]
            at += 1
            if row >= 0:
                rows[count] = row
                count += 1
        for j in range(count):
            source = keys[rows[j] * key_stride : rows[j] * key_stride + dim]
            _fetch(values, rows[j] * value_stride, value_dim)
            for g in range(0, group, 4):
                _four_logits(query, g, source, scale, logits, j)
        for g in range(group):
            _rescale(logits[g, :count], state[g], output[g], softcap)
        for j in range(count):
            source = values[rows[j] * value_stride : rows[j] * value_stride + value_dim]
            if at + j < end:
                _fetch(keys, max(at + j if index.shape[0] == 0 else index[at + j], 0) * key_stride, dim)
            for g in range(0, group, 4):
                _four_sums(logits, g, j, source, output)


@nb.njit(parallel=True, **_OPTIONS)
def _attend(query, keys, values, key_strides, value_strides, index, starts, n, splits, scale, softcap, output, state):
    """All rows and KV heads, each in ``splits`` parts: output (batch, kv_heads, splits, group, dv), state (..., group, 2)."""
    kv_heads = query.shape[1]
    for job in nb.prange(query.shape[0] * kv_heads * splits):
        task = np.int64(job)  # the index of prange is unsigned, which would turn sums into floats
        b, rest = divmod(task, kv_heads * splits)
        h, part = divmod(rest, splits)
        length = (n - starts[b, h] + splits - 1) // splits
        begin = starts[b, h] + part * length
        end = min(n, begin + length)
        flat_keys = keys[b * key_strides[0] + h * key_strides[1] :]
        flat_values = values[b * value_strides[0] + h * value_strides[1] :]
        chosen = index[min(b, index.shape[0] - 1), min(h, index.shape[1] - 1)]
        _part(
            query[b, h], flat_keys, flat_values, key_strides[2], value_strides[2], chosen, begin, end,
            scale, softcap, output[b, h, part], state[b, h, part],
        )  # fmt: skip


@nb.njit(parallel=True, **_OPTIONS)
def _vote_chunks(query, keys, strides, starts, stop, scale, weights, tops, sums):
    """exp(logit - top of its chunk) into ``weights`` (batch, kv_heads, group, n), with tops and sums (..., chunks) per chunk."""
    batch, kv_heads, group, dim = query.shape
    chunks = tops.shape[3]
    for job in nb.prange(batch * kv_heads * chunks):
        task = np.int64(job)  # the index of prange is unsigned, which would turn sums into floats
        b, rest = divmod(task, kv_heads * chunks)
        h, chunk = divmod(rest, chunks)
        begin, end = max(chunk * CHUNK, starts[b, h]), min((chunk + 1) * CHUNK, stop)
        base = b * strides[0] + h * strides[1]
        for j in range(begin, end):
            source = keys[base + j * strides[2] : base + j * strides[2] + dim]
            for g in range(0, group, 4):
                _four_logits(query[b, h], g, source, scale, weights[b, h], j)
        for g in range(group):
            _soften(weights[b, h, g, begin:end], tops[b, h, g], sums[b, h, g], chunk)


@nb.njit(**_OPTIONS)
def _soften(logits, tops, sums, chunk):
    """Logits become exp(logit - top); the top and the sum of the chunk are noted."""
    top = NEGATIVE
    for j in range(logits.shape[0]):
        top = max(top, logits[j])
    total = np.float32(0.0)
    for j in range(logits.shape[0]):
        logits[j] = _exp(logits[j] - top)
        total += logits[j]
    tops[chunk], sums[chunk] = top, total


@nb.njit(**_OPTIONS)
def _add(weights, factor, votes):
    for j in range(votes.shape[0]):
        votes[j] += weights[j] * factor


@nb.njit(parallel=True, **_OPTIONS)
def _gather_votes(weights, factors, starts, stop, votes):
    """votes (batch, kv_heads or 1, n) = sum over heads of weight * factor of its chunk, (batch, kv_heads, group, chunks)."""
    batch, kv_heads, group, _ = weights.shape
    chunks, outputs = factors.shape[3], votes.shape[1]
    for job in nb.prange(batch * outputs * chunks):
        task = np.int64(job)  # the index of prange is unsigned, which would turn sums into floats
        b, rest = divmod(task, outputs * chunks)
        o, chunk = divmod(rest, chunks)
        for h in range(o, o + 1 if outputs > 1 else kv_heads):
            begin, end = max(chunk * CHUNK, starts[b, h]), min((chunk + 1) * CHUNK, stop)
            for g in range(group):
                _add(weights[b, h, g, begin:end], factors[b, h, g, chunk], votes[b, o, begin:end])


def _flat(tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The memory that a view spans, as one flat array, and the view's strides of batch, head and entry in elements."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((max(span, 0),), (1,)).numpy(), np.array(tensor.stride()[:3], np.int64)


def _grouped(query: torch.Tensor, kv_heads: int) -> np.ndarray:
    """Query heads by KV head, float32 ``(batch, kv_heads, group, d)``, the group filled up with zeros to a multiple of four."""
    batch, heads, dim = query.shape
    group = heads // kv_heads
    grouped = query.new_zeros(batch, kv_heads, -(-group // 4) * 4, dim, dtype=torch.float32)
    grouped[:, :, :group] = query.detach().view(batch, kv_heads, group, dim)
    return grouped.numpy()


def _starts(starts: torch.Tensor | None, batch: int, kv_heads: int) -> np.ndarray:
    if starts is None:
        return np.zeros((batch, kv_heads), np.int64)
    return np.ascontiguousarray(starts.expand(batch, kv_heads).numpy())


def use_threads(size: int) -> int:
    """Lets the kernels that follow use as many threads as ``size`` bytes to read are worth; returns how many."""
    count = min(nb.config.NUMBA_NUM_THREADS, torch.get_num_threads(), max(1, size // THREAD_BYTES))
    nb.set_num_threads(count)
    return count


def _run(query, keys, values, index, starts, n, scale, softcap):
    batch, kv_heads = keys.shape[:2]
    grouped = _grouped(query, kv_heads)
    threads = use_threads(batch * kv_heads * n * (keys.shape[-1] + values.shape[-1]) * keys.element_size())
    tasks = batch * kv_heads
    splits = max(1, min(-(-4 * threads // tasks), n // 512))
    flat_keys, key_strides = _flat(keys.detach())
    flat_values, value_strides = _flat(values.detach())
    output = np.empty((*grouped.shape[:2], splits, grouped.shape[2], values.shape[-1]), np.float32)
    state = np.empty((*output.shape[:4], 2), np.float32)
    _attend(
        grouped, flat_keys, flat_values, key_strides, value_strides, index, starts, n, splits,
        np.float32(scale), np.float32(softcap or 0.0), output, state,
    )  # fmt: skip
    return combine(torch.from_numpy(output), torch.from_numpy(state), query)


def decode_attention(query, keys, values, *, scale, starts=None, softcap=None):
    batch, kv_heads, n = keys.shape[:3]
    none = np.empty((1, 1, 0), np.int64)
    return _run(query, keys, values, none, _starts(starts, batch, kv_heads), n, scale, softcap)


def selected_attention(query, keys, values, indices, *, scale, softcap=None):
    batch, kv_heads = keys.shape[:2]
    index = np.ascontiguousarray(indices.numpy())
    return _run(query, keys, values, index, _starts(None, batch, kv_heads), index.shape[2], scale, softcap)


def vote(query, keys, *, scale, starts=None, stop=None, over="layer"):
    batch, kv_heads, n = keys.shape[:3]
    grouped = _grouped(query, kv_heads)
    stop = n if stop is None else min(stop, n)
    chunks = max(1, -(-stop // CHUNK))
    group = query.shape[1] // kv_heads
    weights = np.empty((*grouped.shape[:3], n), np.float32)
    tops = np.full((*grouped.shape[:3], chunks), NEGATIVE, np.float32)
    sums = np.zeros_like(tops)
    first = _starts(starts, batch, kv_heads)
    flat, strides = _flat(keys.detach())
    use_threads(keys.numel() * keys.element_size())
    _vote_chunks(grouped, flat, strides, first, stop, np.float32(scale), weights, tops, sums)
    return tally(weights[:, :, :group], tops[:, :, :group], sums[:, :, :group], first, stop, over)


def tally(weights, tops, sums, first, stop, over):
    """Votes from the weights that the chunks left, float32 ``(batch, 1 or kv_heads, n)``."""
    shares = factors(torch.from_numpy(tops), torch.from_numpy(sums)).numpy()
    batch, kv_heads, _, n = weights.shape
    votes = np.zeros((batch, 1 if over == "layer" else kv_heads, n), np.float32)
    _gather_votes(weights, shares, first, stop, votes)
    return torch.from_numpy(votes)
