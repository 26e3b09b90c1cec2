"""The greedy choice on the CPU.

Where gains only fall as more is picked, an old gain is a bound, and most tokens are never compared with most picks (Minoux,
1978, for submodular functions; the rule of the largest similarity allows it as well). The token of the largest bound is brought
up to date until it stays the largest: alone where it has missed few picks, and otherwise together with those that come next, the
front, by all threads, four tokens and four picks at a time.

Coverage is submodular too, but its gains are often so even that a bound excludes nobody. There the t-th pick raises what is
covered for only about one thing in t, and only those things change gains. A sum of cosines can also grow, which leaves no
bound; there the cosines of a pick are computed together with those of the tokens that will probably be picked next.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba as nb
import numpy as np
import torch

from laconic.kernels import reference_greedy
from laconic.kernels.cpu_common import NEGATIVE, as_float, jit, numbers, padded_rows, row_logits, span_rows, use_threads
from laconic.kernels.simd import HEADS, ROWS

MAX, DISTANCE, DETERMINANT = range(3)
_CODES = {"max": MAX, "distance": DISTANCE, "determinant": DETERMINANT}
_FRONT = 32  # tokens that are brought up to date together
_FEW = 8  # picks that a token may have missed to be brought up to date alone
_SLICE = 256  # tokens whose coverage a thread looks after at a time
_AHEAD = 15  # tokens whose cosines with all others are computed together
_CHUNK, _GROWTH, _LONELIEST = 64, 1.2, 8  # of the search for the most isolated token
_NOTHING = 1e-9  # of what a token covers alone: the rounding of many sums
_EXHAUSTED = np.float32(reference_greedy.EXHAUSTED)


@jit()
def _dot(a, b):
    total = np.float32(0.0)
    for j in range(a.shape[0]):
        total += as_float(a[j]) * as_float(b[j])
    return total


@jit()
def _distances(four, other, column, similar):
    """similar[:, column] = minus the squared distances of ``four`` rows to another."""
    a = b = c = d = np.float32(0.0)
    for j in range(other.shape[0]):
        p, q, r, s = four[0, j] - other[j], four[1, j] - other[j], four[2, j] - other[j], four[3, j] - other[j]
        a, b, c, d = a + p * p, b + q * q, c + r * r, d + s * s
    similar[0, column], similar[1, column], similar[2, column], similar[3, column] = -a, -b, -c, -d


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
def _open(rule, rows, weight, offset, usable, size):
    """Gains with nothing picked, and -inf after them; ``size`` becomes what rows are multiplied by before they are compared."""
    n = weight.shape[0]
    bound = np.full(n + 1, NEGATIVE, np.float32)
    for i in range(n):
        if usable[i]:
            bound[i] = weight[i] * weight[i] if rule == DETERMINANT else offset[i]
            if rule != DISTANCE:
                length = np.sqrt(_dot(rows[i], rows[i]))
                size[i] = (weight[i] if rule == DETERMINANT else np.float32(1.0)) / max(length, np.float32(1e-12))
    return bound


@jit()
def _copy(row, size, to):
    for j in range(row.shape[0]):
        to[j] = as_float(row[j]) * size


@jit()
def _compare(rule, four, picked, first, last, similar):
    """similar (HEADS, any) = products, or minus squared distances, of ``four`` tokens and picks first..last-1."""
    if rule == DISTANCE:
        for s in range(first, last):
            _distances(four, picked[s], s - first, similar)
    else:
        places = np.empty(padded_rows(last - first), np.int64)
        span_rows(first * picked.shape[1], last - first, picked.shape[1], places)
        row_logits(four, picked.reshape(-1), places, last - first, np.float32(1.0), similar, 0)


@jit()
def _residual(product, mine, other, pivot, t, residual, all_of_it):
    """What pick t leaves of the squared ``residual`` of a token, whose entry of the Cholesky factor becomes mine[t]."""
    if pivot <= 0:  # a pick that added nothing explains nothing
        mine[t] = np.float32(0.0)
        return residual
    mine[t] = (product - _dot(mine[:t], other[:t])) / np.sqrt(pivot)
    left = residual - mine[t] * mine[t]
    return left if left > _EXHAUSTED * all_of_it else np.float32(0.0)


class _State(NamedTuple):
    """What the lazy choice knows of ``n`` tokens and of the picks so far.

    rows (n, d), weight, offset and size (n,) stay as they are. ``seen[i]`` is how many of the picks ``bound[i]`` takes into
    account; ``picked`` (count, d) holds the picks' rows times their size.
    """

    rows: np.ndarray
    weight: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    order: np.ndarray
    picked: np.ndarray
    pivots: np.ndarray
    factor: np.ndarray
    similarity: np.ndarray
    seen: np.ndarray
    bound: np.ndarray


@jit()
def _catch_up(rule, s, tokens, t):
    """Brings the gains of up to HEADS tokens up to date with the first t picks."""
    four, first = np.zeros((HEADS, s.rows.shape[1]), np.float32), t
    for q in range(tokens.shape[0]):
        _copy(s.rows[tokens[q]], s.size[tokens[q]], four[q])
        first = min(first, s.seen[tokens[q]])
    similar = np.empty((HEADS, t - first + ROWS), np.float32)
    _compare(rule, four, s.picked, first, t, similar)
    for q in range(tokens.shape[0]):
        i = tokens[q]
        whole = s.weight[i] * s.weight[i]
        for p in range(s.seen[i], t):
            new = similar[q, p - first]
            if rule == DETERMINANT:
                s.bound[i] = _residual(new, s.factor[i], s.factor[s.order[p]], s.pivots[p], p, s.bound[i], whole)
            elif new > s.similarity[i]:
                s.similarity[i] = new
        if rule != DETERMINANT:
            s.bound[i] = s.offset[i] - s.weight[i] * s.similarity[i]
        s.seen[i] = t


@jit(parallel=True)
def _all_catch_up(rule, s, tokens, t):
    """The same for any number of tokens, shared among the threads."""
    for job in nb.prange((tokens.shape[0] + HEADS - 1) // HEADS):
        begin = np.int64(job) * HEADS  # the index of prange is unsigned
        _catch_up(rule, s, tokens[begin : begin + HEADS], t)


@jit()
def _front(tree, bound, tokens):
    """Fills ``tokens`` with those of the largest bounds, and says how many there are. They stay in the tree."""
    count, kept = 0, np.empty(tokens.shape[0], np.float32)
    while count < tokens.shape[0] and bound[tree[1]] > NEGATIVE:
        i = tree[1]
        tokens[count], kept[count], bound[i] = i, bound[i], NEGATIVE
        _play(tree, bound, i)
        count += 1
    for c in range(count):
        bound[tokens[c]] = kept[c]
    return count


@jit()
def _lazy(rule, rows, weight, offset, usable, seed, order):
    """Fills ``order`` with tokens of ``rows`` (n, d)."""
    n, count = weight.shape[0], order.shape[0]
    size, similarity = np.ones(n, np.float32), np.full(n, NEGATIVE, np.float32)
    factor = np.empty((n if rule == DETERMINANT else 0, count), np.float32)
    picked, pivots, seen = np.empty((count, rows.shape[1]), np.float32), np.empty(count, np.float32), np.zeros(n, np.int64)
    bound = _open(rule, rows, weight, offset, usable, size)
    state = _State(rows, weight, offset, size, order, picked, pivots, factor, similarity, seen, bound)
    tree, front = _tournament(bound), np.empty(_FRONT, np.int64)
    for t in range(count):
        i = seed if t == 0 and seed >= 0 else tree[1]
        while seen[i] < t:
            if t - seen[i] <= _FEW:
                front[0], stale = i, front[:1]
                _catch_up(rule, state, stale, t)
            else:
                stale = front[: _front(tree, bound, front)]
                _all_catch_up(rule, state, stale, t)
            for c in stale:
                _play(tree, bound, c)
            i = tree[1]
        order[t], pivots[t], bound[i] = i, bound[i], NEGATIVE
        _copy(rows[i], size[i], picked[t])
        _play(tree, bound, i)
        if t == 0:  # a cosine may be negative, which makes a gain larger than with nothing picked: all are looked at once
            _all_catch_up(rule, state, np.nonzero(bound[:n] > NEGATIVE)[0], 1)
            tree = _tournament(bound)


@jit()
def _add_excess(row, low, high, sign, gain):
    """gain += sign * how much of ``row`` lies between ``low`` and ``high``."""
    for i in range(row.shape[0]):
        value = np.float64(as_float(row[i]))
        value = (value if value < high else high) - low
        gain[i] += sign * (value if value > 0 else 0.0)


@jit(parallel=True)
def _cover_more(things, raised, count, low, high, sign, gain):
    """gain += sign * how much of the rows raised[:count] of ``things`` (things, n) lies between ``low`` and ``high``."""
    n = gain.shape[0]
    for job in nb.prange((n + _SLICE - 1) // _SLICE):
        begin = np.int64(job) * _SLICE
        end = min(begin + _SLICE, n)
        for r in range(count):
            _add_excess(things[raised[r], begin:end], low[r], high[r], sign, gain[begin:end])


@jit()
def _cover(things, weight, usable, seed, order):
    """Fills ``order``; ``things`` (things, n). In double precision gains that come to nothing really do, up to _NOTHING."""
    n, kinds = weight.shape[0], things.shape[0]
    gain, cover, free = np.zeros(n), np.zeros(kinds), usable.copy()
    raised, low, high = np.arange(kinds), np.zeros(kinds), np.full(kinds, np.inf)
    _cover_more(things, raised, kinds, low, high, 1.0, gain)
    least = gain * _NOTHING
    for t in range(order.shape[0]):
        pick, best = -1, -1.0
        for i in range(n):
            if free[i]:
                more = weight[i] * gain[i] if gain[i] > least[i] else 0.0
                if more > best:
                    pick, best = i, more
        pick = seed if t == 0 and seed >= 0 else pick
        order[t], free[pick], count = pick, False, 0
        for r in range(kinds):
            now = np.float64(as_float(things[r, pick]))
            if now > cover[r]:
                raised[count], low[count], high[count], cover[r] = r, cover[r], now, now
                count += 1
        _cover_more(things, raised, count, low, high, -1.0, gain)


def _sum(rows, weight, offset, usable, seed, order):
    """Fills ``order`` with tokens of ``rows`` (n, d), all tensors. It holds no more rows of cosines than it has still to pick
    and _AHEAD: wrong guesses do not add up to a matrix."""
    units = reference_greedy.unit(rows).masked_fill_(~usable[:, None], 0.0)
    gain, weight = offset.masked_fill(~usable, NEGATIVE).numpy(), weight.numpy()
    cosines: dict[int, np.ndarray] = {}
    for t in range(len(order)):
        pick = seed if t == 0 and seed >= 0 else int(gain.argmax())  # the first of equal ones
        if pick not in cosines:
            fresh = gain.copy()
            fresh[[pick, *cosines]] = NEGATIVE
            likely = np.argpartition(fresh, -min(_AHEAD, len(fresh)))[-_AHEAD:]
            together = [pick, *likely[fresh[likely] > NEGATIVE].tolist()]
            best = sorted(cosines, key=gain.__getitem__, reverse=True)[: len(order) - t]
            columns = (units @ units[together].T).numpy()
            cosines = {i: cosines[i] for i in best} | {i: columns[:, c].copy() for c, i in enumerate(together)}
        order[t] = pick
        gain -= weight * cosines.pop(pick)
        gain[pick] = NEGATIVE


def greedy(rule, rows, weight, offset, usable, seeds, counts):
    """As the reference; one row after another, each with all threads."""
    order = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int64)
    use_threads(rows[:1].numel() * rows.element_size())
    rows = (rows.mT if rule == "coverage" else rows).contiguous()
    for b, count in enumerate(counts.tolist()):
        row = rows[b], weight[b].contiguous(), offset[b].contiguous(), usable[b].contiguous()
        if rule == "sum":
            _sum(*row, int(seeds[b]), order[b, :count])
            continue
        held, weights, offsets, free = (numbers(part).numpy() for part in row)
        if rule == "coverage":
            _cover(held, weights, free, int(seeds[b]), order[b, :count].numpy())
        else:
            _lazy(_CODES[rule], held, weights, offsets, free, int(seeds[b]), order[b, :count].numpy())
    return order


@jit(parallel=True)
def _meet(units, tokens, others, nearest):
    """nearest[tokens] = the largest of it and of the cosines with ``others`` of rows of length 1, but not with the same row."""
    width, count = units.shape[1], others.shape[0]
    places = np.full(padded_rows(count), others[count - 1] * width)
    places[:count] = others * width
    for job in nb.prange((tokens.shape[0] + HEADS - 1) // HEADS):
        begin = np.int64(job) * HEADS
        own = tokens[begin : begin + HEADS]
        four, cosines = np.zeros((HEADS, width), np.float32), np.empty((HEADS, count + ROWS), np.float32)
        for q in range(own.shape[0]):
            four[q] = units[own[q]]
        row_logits(four, units.reshape(-1), places, count, np.float32(1.0), cosines, 0)
        for q in range(own.shape[0]):
            for j in range(count):
                if cosines[q, j] > nearest[own[q]] and others[j] != own[q]:
                    nearest[own[q]] = cosines[q, j]


def most_isolated(units):
    """As the reference. All tokens meet the others in an order of which every part is spread evenly over them. After each part
    the loneliest meet the rest: who has met a nearer one than the best of them is out."""
    use_threads(units.numel() * units.element_size())
    units, n = units.contiguous().numpy(), len(units)
    step = next(s for s in range(int(0.618 * n) or 1, 2 * n + 1) if math.gcd(s, n) == 1)
    others = np.arange(n) * step % n
    alive, nearest = np.arange(n), np.full(n, NEGATIVE)
    mark, begin, size = np.inf, 0, _CHUNK
    while begin < n and len(alive) > 1:
        end = min(begin + int(size), n)
        _meet(units, alive, others[begin:end], nearest)
        loneliest = alive[nearest[alive].argsort()[:_LONELIEST]]
        if end < n:
            _meet(units, loneliest, others[end:], nearest)
        mark = min(mark, nearest[loneliest].min())
        alive = alive[nearest[alive] <= mark]
        begin, size = end, size * _GROWTH
    return int(alive[nearest[alive].argmin()])
