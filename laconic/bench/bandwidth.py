"""How fast this machine reads memory: the physical limit that a decode step, which reads the whole cache, is held to."""

from __future__ import annotations

import time

import numba as nb
import numpy as np

BYTES = 1 << 29  # many times the last-level cache, so that nothing is left over from the read before
PIECES = 256  # more than threads, so that a thread that was interrupted holds up no other


@nb.njit(parallel=True, nogil=True, cache=True, fastmath=True)
def _read(words: np.ndarray, sums: np.ndarray) -> None:
    """sums (pieces,) = sum of each piece of ``words`` (pieces, length): adding costs less than reading."""
    for piece in nb.prange(words.shape[0]):
        total = np.float32(0.0)
        row = words[piece]
        for i in range(row.shape[0]):
            total += row[i]
        sums[piece] = total


class ReadStep:
    """Reads ``size`` bytes once per call on all numba threads; a step for ``laconic.bench.figure.interleave``."""

    def __init__(self, size: int = BYTES) -> None:
        self._words = np.ones((PIECES, max(1, size // (4 * PIECES))), np.float32)
        self._sums = np.empty(PIECES, np.float32)
        self.bytes = self._words.nbytes

    def __call__(self, i: int = 0) -> float:
        """The sum of all words, so that no read can be left out."""
        _read(self._words, self._sums)
        return float(self._sums.sum())


def read_bandwidth(repeats: int = 7, size: int = BYTES) -> float:
    """Bytes per second of a sequential read of ``size`` bytes on all numba threads, the best of ``repeats`` passes."""
    step = ReadStep(size)
    step()  # compiles, and brings in the pages
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return step.bytes / best
