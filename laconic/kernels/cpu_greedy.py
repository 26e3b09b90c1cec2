"""The greedy choice on the CPU: gains only fall as more is picked, so an old gain is a bound, and most tokens are never
compared with most picks. (Minoux, 1978, for submodular functions; the rule of the largest similarity allows it as well.)"""

from __future__ import annotations

import numba as nb
import numpy as np
import torch

from laconic.kernels import reference_greedy
from laconic.kernels.cpu_common import NEGATIVE, as_float, jit, numbers, use_threads

MAX, DISTANCE, COVERAGE, DETERMINANT = range(4)
_CODES = {"max": MAX, "distance": DISTANCE, "coverage": COVERAGE, "determinant": DETERMINANT}
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
def _beyond(row, cover):
    """How much of ``row`` lies above ``cover``."""
    total = np.float32(0.0)
    for j in range(cover.shape[0]):
        more = as_float(row[j]) - cover[j]
        total += more if more > 0 else np.float32(0.0)
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
def _open(rule, rows, weight, offset, usable, scale, cover):
    """Gains with nothing picked, and -inf after them; ``scale`` becomes the factor that makes a row as long as its weight."""
    n = weight.shape[0]
    bound = np.full(n + 1, NEGATIVE, np.float32)
    for i in range(n):
        if usable[i]:
            if rule == COVERAGE:
                bound[i] = weight[i] * _beyond(rows[i], cover)
            elif rule == DETERMINANT:
                bound[i] = weight[i] * weight[i]
            else:
                bound[i] = offset[i]
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
    cover = np.zeros(rows.shape[1] if rule == COVERAGE else 0, np.float32)
    factor = np.empty((n if rule == DETERMINANT else 0, count), np.float32)
    pivots, seen = np.empty(count, np.float32), np.zeros(n, np.int64)
    bound = _open(rule, rows, weight, offset, usable, scale, cover)
    tree = _tournament(bound)
    for t in range(count):
        i = seed if t == 0 and seed >= 0 else tree[1]
        while seen[i] < t:
            old = bound[i]
            while seen[i] < t and bound[i] == old:  # as long as it is sure to be looked at next
                if rule == COVERAGE:
                    bound[i] = weight[i] * _beyond(rows[i], cover)
                    seen[i] = t
                    continue
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
        if rule == COVERAGE:
            for j in range(cover.shape[0]):
                cover[j] = max(cover[j], as_float(rows[i, j]))
        if t == 0:
            _after_first(rule, bound)
            tree = _tournament(bound)
        _play(tree, bound, i)


@jit(parallel=True)
def _lazy_rows(rule, rows, weight, offset, usable, seeds, counts, order):
    for job in nb.prange(rows.shape[0]):
        b = np.int64(job)  # the index of prange is unsigned
        _lazy(rule, rows[b], weight[b], offset[b], usable[b], seeds[b], order[b, : counts[b]])


def greedy(rule, rows, weight, offset, usable, seeds, counts):
    """As the reference. The sum of cosines can also fall, which leaves no bound: it is computed for all after each pick."""
    if rule == "sum":
        return reference_greedy.greedy(rule, rows, weight, offset, usable, seeds, counts)
    use_threads(rows.numel() * rows.element_size())
    order = np.full((len(counts), int(counts.max())), -1, np.int64)
    arrays = [part.contiguous().numpy() for part in (numbers(rows.contiguous()), weight, offset, usable, seeds, counts)]
    _lazy_rows(_CODES[rule], *arrays, order)
    return torch.from_numpy(order)
