"""What the CPU kernels share: compiling, exponentials, and the way tensors come in.

Arrays come in flat, with offsets and strides in elements: any view of a larger buffer, and heads of different lengths, are
read where they lie.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
import torch

from laconic.kernels.ragged import Ragged
from laconic.kernels.simd import AHEAD, HEADS, LANES, ROWS, as_float, dots, power_of_two

NEGATIVE = np.float32(-np.inf)
FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # how simd tells the two apart


def jit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``numba.njit`` that keeps the machine code on disk where there is a directory to write it to."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        merged = {"nogil": True, "fastmath": FAST} | options
        try:
            return nb.njit(cache=True, **merged)(function)
        except RuntimeError:  # numba found no writable directory
            return nb.njit(**merged)(function)

    return decorate


@jit(inline="always")
def exp(x):
    """exp for x <= 0, of plain arithmetic so that loops over it become SIMD; NaN stays NaN.

    The relative error is below 3e-7 + 8e-8 |x|; below x = -87 the result is at most 2e-38.
    """
    t = x * np.float32(1.4426950408889634)
    t = np.float32(-126.0) if t < np.float32(-126.0) else t
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
    return p * power_of_two(whole)


@jit(fastmath=FAST | {"nnan"})
def largest(row, top):
    """The largest of a row and ``top``; NaN is passed over, which lets the loop become SIMD."""
    for j in range(row.shape[0]):
        top = row[j] if row[j] > top else top
    return top


@jit()
def soften(row, top):
    """Logits become exp(logit - top), in place; the sum of them comes back."""
    total = np.float32(0.0)
    for j in range(row.shape[0]):
        weight = exp(row[j] - top)
        row[j] = weight
        total += weight
    return total


@jit()
def cap(row, softcap):
    """Logits become softcap * tanh(logit / softcap), in place."""
    for j in range(row.shape[0]):
        x = row[j] / softcap
        e = exp(np.float32(-2.0) * abs(x))
        tanh = (np.float32(1.0) - e) / (np.float32(1.0) + e)
        row[j] = softcap * (tanh if x > 0 else -tanh)


@jit(inline="always")
def padded_rows(count):
    """Entries that ``dots`` and ``add_rows`` want in an array of ``count`` rows: fours, and what they ask for ahead."""
    return (count + ROWS - 1) // ROWS * ROWS + AHEAD


@jit()
def span_rows(first, count, stride, rows):
    """rows = offsets of ``count`` neighbouring entries from offset ``first`` on, and what ``dots`` wants after them."""
    for j in range(padded_rows(count)):
        rows[j] = first + j * stride
    for j in range(count, (count + ROWS - 1) // ROWS * ROWS):
        rows[j] = rows[count - 1]  # these are read, so they must be there


@jit()
def row_logits(query, keys, rows, count, scale, logits, column):
    """logits (group, any) of ``count`` keys from ``column`` on, and of up to three more up to a multiple of four."""
    group, dim = query.shape
    for j in range(0, count, ROWS):
        for g in range(0, group, HEADS):
            dots(query, g, keys, rows, j, scale, logits, column + j)
    if dim % LANES:
        for j in range(count):
            for g in range(group):
                total = np.float32(0.0)
                for i in range(dim // LANES * LANES, dim):
                    total += query[g, i] * as_float(keys[rows[j] + i])
                logits[g, column + j] += total * scale


THREAD_BYTES = 2 << 20  # what a thread has to read to be worth waking: below this, waking takes longer than reading
_kept = threading.local()


def use_threads(size: int) -> int:
    """Lets the kernels that follow use as many threads as ``size`` bytes to read are worth; returns how many."""
    threads = torch.get_num_threads()
    count = min(nb.config.NUMBA_NUM_THREADS, threads, max(1, size // THREAD_BYTES))
    nb.set_num_threads(count)
    if torch.get_num_threads() != threads:  # numba's first start sets the number of OpenMP threads for torch too
        torch.set_num_threads(threads)
    return count


def scratch(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised float32 that the next call in this thread gets again: fresh pages would cost more than the work on them."""
    size = math.prod(shape)
    if getattr(_kept, "space", None) is None or not size <= _kept.space.size <= 8 * size:
        _kept.space = np.empty(size + size // 8, np.float32)
    return _kept.space[:size].reshape(shape)


def flat(tensor: torch.Tensor | Ragged) -> tuple[np.ndarray, np.ndarray, int]:
    """The memory that a view spans, as one flat array, and in elements of it the offsets ``(batch, heads)`` at which slot 0 of
    each row and head stands, and the stride from slot to slot."""
    if isinstance(tensor, Ragged):
        width = tensor.data.stride(0)
        return numbers(tensor.data).numpy().reshape(-1), (tensor.bases * width).contiguous().numpy(), width
    tensor = numbers(tensor.detach())
    (batch, heads), (row, head, entry) = tensor.shape[:2], tensor.stride()[:3]
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    rows, columns = _numbered(batch, heads)
    bases = rows * row + columns * head
    return tensor.as_strided((span if tensor.numel() else 0,), (1,)).numpy(), bases, entry


@functools.lru_cache(maxsize=64)
def _numbered(batch: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(batch, dtype=np.int64)[:, None], np.arange(heads, dtype=np.int64)


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a type that NumPy has."""
    return tensor.view(_BITS[tensor.dtype]) if tensor.dtype in _BITS else tensor


def grouped(query: torch.Tensor, kv_heads: int) -> np.ndarray:
    """Query heads by KV head, float32 ``(batch, kv_heads, group, d)``, the group filled up with zeros to a multiple of four."""
    batch, heads, dim = query.shape
    group = heads // kv_heads
    padded = query.new_zeros(batch, kv_heads, -(-group // HEADS) * HEADS, dim, dtype=torch.float32)
    padded[:, :, :group] = query.detach().reshape(batch, kv_heads, group, dim)
    return padded.numpy()


def first_slots(starts: torch.Tensor | None, keys: torch.Tensor | Ragged) -> np.ndarray:
    """First slots ``(batch, kv_heads)`` of ``keys`` that are visible and stored, int64; None is 0."""
    first = np.zeros(tuple(keys.shape[:2]), np.int64)
    if starts is not None:
        first = np.ascontiguousarray(starts.expand(keys.shape[:2]).numpy())
    return np.maximum(first, keys.starts.numpy()) if isinstance(keys, Ragged) else first
