"""Closing gaps on the CPU: entries move in place, and only those beyond the first gap."""

from __future__ import annotations

import numba as nb
import numpy as np

from laconic.kernels.cpu_common import flat, jit, use_threads


@jit()
def _copy(data, begin, to, width):
    for i in range(width):
        data[to + i] = data[begin + i]


@jit(parallel=True)
def _compact(data, source, target, stride, width, slots):
    """data[target + j] = data[source + slots[j]] for every row and head.

    Slots ascend, so what moves up stands before what moves down, and neither reaches into the other's part: from the top
    down for the first, from the bottom up for the second, and nothing is overwritten before it has moved.
    """
    batch, heads = source.shape
    for job in nb.prange(batch * heads):
        b, h = divmod(np.int64(job), heads)
        own = slots[min(b, slots.shape[0] - 1), min(h, slots.shape[1] - 1)]
        count = own.shape[0]
        for back in range(count):
            j = count - 1 - back
            begin, to = source[b, h] + own[j] * stride, target[b, h] + j * stride
            if own[j] >= 0 and begin < to:
                _copy(data, begin, to, width)
        for j in range(count):
            begin, to = source[b, h] + own[j] * stride, target[b, h] + j * stride
            if own[j] >= 0 and begin > to:
                _copy(data, begin, to, width)


def compact(entries, slots, bases=None):
    data, source, stride = flat(entries)
    width = entries.shape[3] if len(entries.shape) == 4 else 1
    target = source if bases is None else (bases * stride).contiguous().numpy()
    use_threads(2 * data.itemsize * width * slots.numel())
    _compact(data, source, target, stride, width, np.ascontiguousarray(slots.numpy()))
