"""How fast this machine reads memory: the physical limit that a decode step, which reads the whole cache, is held to."""

from __future__ import annotations

import numba as nb
import numpy as np
import torch

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
    """Reads the memory that float32 ``tensors`` lie in once per call, on all numba threads.

    The very pages of the cache are read, not other ones: on a shared machine one buffer may be reached at twice the speed
    of the next, by where its pages happen to lie. A step for ``laconic.bench.figure.interleave``.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._parts = [_pieces(tensor) for tensor in tensors]
        self.bytes = sum(part.nbytes for part in self._parts)

    def __call__(self, i: int = 0) -> float:
        """The sum of all words, so that no read can be left out."""
        sums = np.empty((len(self._parts), PIECES), np.float32)
        for part, row in zip(self._parts, sums, strict=True):
            _read(part, row)
        return float(sums.sum())


def _pieces(tensor: torch.Tensor) -> np.ndarray:
    """What a view spans, room between its rows included, as ``(PIECES, length)``; the odd words at the end are left out."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = span // PIECES
    return tensor.as_strided((PIECES * length,), (1,)).numpy().reshape(PIECES, length)
