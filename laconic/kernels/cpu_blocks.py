"""Logits on the CPU: of all keys, of chosen ones, and the bounds of blocks, which are logits too."""

from __future__ import annotations

import numba as nb
import numpy as np
import torch

from laconic.kernels.cpu_common import NEGATIVE, first_slots, flat, grouped, jit, padded_rows, row_logits, use_threads
from laconic.kernels.simd import ROWS

CHUNK = 1024  # keys per task


@jit(parallel=True)
def _logit_chunks(query, keys, bases, stride, starts, indices, n, scale, logits):
    """q.k of all rows, or of those of ``indices`` (batch, kv_heads, n; no row and 0 entries: all), into ``logits``."""
    batch, kv_heads = query.shape[:2]
    chunks = (n + CHUNK - 1) // CHUNK
    for job in nb.prange(batch * kv_heads * chunks):
        task = np.int64(job)  # the index of prange is unsigned, which would turn sums into floats
        b, rest = divmod(task, kv_heads * chunks)
        h, chunk = divmod(rest, chunks)
        begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, n)
        rows = np.empty(padded_rows(CHUNK), np.int64)
        for j in range(padded_rows(end - begin)):
            at = min(begin + j, end - 1)
            row = indices[b, h, at] if indices.shape[2] else at
            rows[j] = bases[b, h] + max(row, starts[b, h]) * stride
        row_logits(query[b, h], keys, rows, end - begin, scale, logits[b, h], begin)
        for j in range(begin, end):
            if indices.shape[2] and indices[b, h, j] < 0:
                logits[b, h, :, j] = NEGATIVE
            elif not indices.shape[2] and j < starts[b, h]:  # nothing is stored there
                logits[b, h, :, j] = np.float32(0.0)


def logits(query, keys, *, scale=1.0, indices=None):
    batch, kv_heads = keys.shape[:2]
    n = keys.shape[2] if indices is None else indices.shape[2]
    use_threads(batch * kv_heads * n * keys.shape[3] * keys.element_size())
    groups = grouped(query, kv_heads)
    chosen = np.empty((batch, kv_heads, 0), np.int64)
    if indices is not None:
        chosen = np.ascontiguousarray(indices.expand(batch, kv_heads, n).numpy())
    flat_keys, bases, stride = flat(keys)
    out = np.empty((*groups.shape[:3], -(-n // ROWS) * ROWS), np.float32)
    if n:
        _logit_chunks(groups, flat_keys, bases, stride, first_slots(None, keys), chosen, n, np.float32(scale), out)
    return torch.from_numpy(out)[:, :, : query.shape[1] // kv_heads, :n].flatten(1, 2)
