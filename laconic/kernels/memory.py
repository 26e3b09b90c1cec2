"""Room for large buffers."""

from __future__ import annotations

import math

import numpy as np
import torch

HUGE = 1 << 22  # bytes from which on NumPy asks for huge pages
LINE = 64  # bytes: a vector that straddles two cache lines costs two reads


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialised contiguous tensor; on the CPU in huge pages where the system gives them (Linux).

    Reading a cache of hundreds of megabytes in pages of 4 KB reaches two thirds of the bandwidth, for the processor's
    prefetchers stop at the end of a page. NumPy asks for huge pages, torch does not.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE or torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = np.empty(size + LINE, np.uint8)
    start = -buffer.ctypes.data % LINE
    return torch.from_numpy(buffer[start : start + size]).view(dtype).view(shape)
