"""Entries of heads with different lengths, side by side in one piece of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

SPARE = 4  # rows in front of the first head: kernels that take four rows at a time may look, but not use, so far ahead of it


@dataclass(eq=False)  # not frozen: like a tensor on its way through a model, it carries the cache layer that it belongs to
class Ragged:
    """What a tensor ``(batch, kv_heads, n, dim)`` is whose rows and heads store only the slots from their own first one on.

    Kernels read it in place of a tensor. Slots before a head's first one hold nothing; wherever a whole tensor is made of it,
    these are zeros.

    Attributes:
        data: ``(places, dim)``, contiguous: all entries.
        bases: int64 ``(batch, kv_heads)``: the place at which slot 0 of each row and head would stand; it may be negative.
        starts: int64 ``(batch, kv_heads)``: the first slot that is stored.
        n: slots, counted as those of the longest.
    """

    data: torch.Tensor
    bases: torch.Tensor
    starts: torch.Tensor
    n: int

    requires_grad = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.bases.shape, self.n, self.data.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def stride(self, dim: int = -1) -> int:
        return self.data.stride(0) if dim == 2 else 1

    def element_size(self) -> int:
        return self.data.element_size()

    def numel(self) -> int:
        """Numbers stored; slots that hold nothing do not count."""
        return int((self.n - self.starts).sum()) * self.data.shape[1]

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """A copy of the entries at ``slots``, int64 ``(batch, kv_heads, k)``; zeros for -1 and for slots that hold nothing."""
        real = slots >= self.starts[..., None]
        place = (self.bases[..., None] + slots).masked_fill(~real, 0)
        return self.data[place].masked_fill(~real[..., None], 0)

    def padded(self, begin: int = 0) -> torch.Tensor:
        """A copy ``(batch, kv_heads, n - begin, dim)`` of all slots from ``begin`` on."""
        slot = torch.arange(begin, self.n, device=self.data.device)
        return self.rows(slot.expand(*self.bases.shape, -1))

    def float(self) -> torch.Tensor:
        """As ``padded``, in float32."""
        return self.padded().float()

    def __getitem__(self, index: Any) -> torch.Tensor | Ragged:
        """``[a:b]`` are some rows, ragged as well. All else is a part of ``padded()``; ``[:, :, begin:]`` copies only that."""
        if isinstance(index, slice):
            return Ragged(self.data, self.bases[index], self.starts[index], self.n)
        whole = slice(None)
        if isinstance(index, tuple) and len(index) == 3 and index[:2] == (whole, whole) and isinstance(index[2], slice):
            begin, end, step = index[2].indices(self.n)
            if step == 1:
                return self.padded(begin)[:, :, : max(0, end - begin)]
        return self.padded()[index]


@dataclass(frozen=True)
class Places:
    """Where rows and heads of ``n - starts`` entries stand one after the other, each with ``room`` for more after it."""

    bases: torch.Tensor
    total: int

    @classmethod
    def of(cls, starts: torch.Tensor, n: int, room: int) -> Places:
        size = (n - starts).flatten() + room
        first = size.cumsum(0) - size + SPARE
        return cls(first.view(starts.shape) - starts, int(size.sum()) + SPARE)


def dense(tensor: torch.Tensor | Ragged) -> torch.Tensor:
    """``tensor`` itself, or the whole of it where it is ragged."""
    return tensor.padded() if isinstance(tensor, Ragged) else tensor
