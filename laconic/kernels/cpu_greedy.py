"""The greedy choice on the CPU.

Where gains only fall as more is picked, an old gain is a bound, and most tokens are never compared with most picks (Minoux,
1978, for submodular functions; the rule of the largest similarity allows it as well). Coverage is submodular too, but its gains
are often so even that a bound excludes nobody. There the t-th pick raises what is covered for only about one thing in t, and
only those things change gains.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import torch

from laconic.kernels import reference_greedy
from laconic.kernels.cpu_common import NEGATIVE, as_float, jit, numbers, use_threads

MAX, DISTANCE, DETERMINANT = range(3)
_CODES = {"max": MAX, "distance": DISTANCE, "determinant": DETERMINANT}
_NOTHING = 1e-9  # of what a token covers alone: the rounding of many sums
_EXHAUSTED = np.float32(reference_greedy.EXHAUSTED)


@jit()
def _dot(a, b):
    total = np.float32(0.0)
    for j in range(a.shape[0]):
        total += as_float(a[j]) * as_float(b[j])
    return total


@jit()
def _distance(a, b):
    total = np.float32(0.0)
    for j in range(a.shape[0]):
        step = as_float(a[j]) - as_float(b[j])
        total += step * step
    return total


@jit()
def _play(tree, bound, i):
    """Brings the winners above leaf ``i`` up to date. tree[1] is the index of the largest bound, the lowest of equal ones."""
    node = (tree.shape[0] // 2 + i) >> 1
    while node > 0:
        left, right = tree[2 * node], tree[2 * node + 1]
        tree[node] = right if bound[right] > bound[left] else left
        node >>= 1


@jit()
def _tournament(bound):
    """A tree of winners over all but the last entry of ``bound``, which stands for the places that are left over."""
    size, n = 1, bound.shape[0] - 1
    while size < n:
        size *= 2
    tree = np.full(2 * size, n, np.int64)
    tree[size : size + n] = np.arange(n)
    for node in range(size - 1, 0, -1):
        left, right = tree[2 * node], tree[2 * node + 1]
        tree[node] = right if bound[right] > bound[left] else left
    return tree


@jit()
def _open(rule, rows, weight, offset, usable, scale):
    """Gains with nothing picked, and -inf after them; ``scale`` becomes the factor that makes a row as long as its weight."""
    n = weight.shape[0]
    bound = np.full(n + 1, NEGATIVE, np.float32)
    for i in range(n):
        if usable[i]:
            bound[i] = weight[i] * weight[i] if rule == DETERMINANT else offset[i]
            if rule in (MAX, DETERMINANT):
                length = np.sqrt(_dot(rows[i], rows[i]))
                scale[i] = np.float32(1.0) / max(length, np.float32(1e-12))
    return bound


@jit()
def _nearer(rule, rows, scale, i, j, similarity):
    """The larger of ``similarity`` and that of tokens i and j."""
    new = _dot(rows[i], rows[j]) * scale[i] * scale[j] if rule == MAX else -_distance(rows[i], rows[j])
    return new if new > similarity else similarity


@jit()
def _residual(rows, weight, scale, factor, pivots, i, j, t, residual):
    """What pick t, token j, leaves of the squared ``residual`` of token i, whose entry of the Cholesky factor it adds."""
    if pivots[t] <= 0:  # a pick that added nothing explains nothing
        factor[i, t] = np.float32(0.0)
        return residual
    product = _dot(rows[i], rows[j]) * scale[i] * scale[j] * weight[i] * weight[j]
    entry = (product - _dot(factor[i, :t], factor[j, :t])) / np.sqrt(pivots[t])
    factor[i, t] = entry
    left = residual - entry * entry
    return left if left > _EXHAUSTED * weight[i] * weight[i] else np.float32(0.0)


@jit()
def _after_first(rule, bound):
    """What the gains can be at most once something is picked."""
    if rule in (MAX, DISTANCE):  # a cosine may be negative, which makes a gain larger than with nothing picked
        for i in range(bound.shape[0]):
            if bound[i] > NEGATIVE:
                bound[i] = np.float32(np.inf)


@jit()
def _lazy(rule, rows, weight, offset, usable, seed, order):
    """Fills ``order`` with tokens of ``rows`` (n, d). seen[i] is how many of the picks bound[i] takes into account."""
    n, count = weight.shape[0], order.shape[0]
    scale, similarity = np.empty(n, np.float32), np.full(n, NEGATIVE, np.float32)
    factor = np.empty((n if rule == DETERMINANT else 0, count), np.float32)
    pivots, seen = np.empty(count, np.float32), np.zeros(n, np.int64)
    bound = _open(rule, rows, weight, offset, usable, scale)
    tree = _tournament(bound)
    for t in range(count):
        i = seed if t == 0 and seed >= 0 else tree[1]
        while seen[i] < t:
            old = bound[i]
            while seen[i] < t and bound[i] == old:  # as long as it is sure to be looked at next
                j = order[seen[i]]
                if rule == DETERMINANT:
                    bound[i] = _residual(rows, weight, scale, factor, pivots, i, j, seen[i], bound[i])
                else:
                    similarity[i] = _nearer(rule, rows, scale, i, j, similarity[i])
                    bound[i] = offset[i] - weight[i] * similarity[i]
                seen[i] += 1
            _play(tree, bound, i)
            i = tree[1]
        order[t], pivots[t], bound[i] = i, bound[i], NEGATIVE
        if t == 0:
            _after_first(rule, bound)
            tree = _tournament(bound)
        _play(tree, bound, i)


@jit(parallel=True)
def _lazy_rows(rule, rows, weight, offset, usable, seeds, counts, order):
    for job in nb.prange(rows.shape[0]):
        b = np.int64(job)  # the index of prange is unsigned
        _lazy(rule, rows[b], weight[b], offset[b], usable[b], seeds[b], order[b, : counts[b]])


@jit()
def _add_excess(row, low, high, sign, gain):
    """gain += sign * how much of ``row`` lies between ``low`` and ``high``."""
    for i in range(row.shape[0]):
        value = np.float64(as_float(row[i]))
        value = (value if value < high else high) - low
        gain[i] += sign * (value if value > 0 else 0.0)


@jit()
def _cover(things, weight, usable, seed, order):
    """Fills ``order``; ``things`` (things, n). In double precision gains that come to nothing really do, up to _NOTHING."""
    n = weight.shape[0]
    gain, cover = np.zeros(n), np.zeros(things.shape[0])
    for r in range(things.shape[0]):
        _add_excess(things[r], 0.0, np.inf, 1.0, gain)
    least, free = gain * _NOTHING, usable.copy()
    for t in range(order.shape[0]):
        pick, best = -1, -1.0
        for i in range(n):
            if free[i]:
                more = weight[i] * gain[i] if gain[i] > least[i] else 0.0
                if more > best:
                    pick, best = i, more
        pick = seed if t == 0 and seed >= 0 else pick
        order[t], free[pick] = pick, False
        for r in range(things.shape[0]):
            now = np.float64(as_float(things[r, pick]))
            if now > cover[r]:
                _add_excess(things[r], cover[r], now, -1.0, gain)
                cover[r] = now


@jit(parallel=True)
def _cover_rows(things, weight, usable, seeds, counts, order):
    for job in nb.prange(things.shape[0]):
        b = np.int64(job)
        _cover(things[b], weight[b], usable[b], seeds[b], order[b, : counts[b]])


def greedy(rule, rows, weight, offset, usable, seeds, counts):
    """As the reference. The sum of cosines can also fall, which leaves no bound: it is computed for all after each pick."""
    if rule == "sum":
        return reference_greedy.greedy(rule, rows, weight, offset, usable, seeds, counts)
    use_threads(rows.numel() * rows.element_size())
    order = np.full((len(counts), int(counts.max())), -1, np.int64)
    rows = numbers((rows.mT if rule == "coverage" else rows).contiguous())
    rows, weight, offset, usable, seeds, counts = (
        part.contiguous().numpy() for part in (rows, weight, offset, usable, seeds, counts)
    )
    if rule == "coverage":
        _cover_rows(rows, weight, usable, seeds, counts, order)
    else:
        _lazy_rows(_CODES[rule], rows, weight, offset, usable, seeds, counts, order)
    return torch.from_numpy(order)
