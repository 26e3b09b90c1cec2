"""Which tokens were chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """Slots of a cache layer that are kept or read.

    Attributes:
        indices: int64 ``(batch, heads, kept)``, ascending; ``heads`` is 1 when all heads share the choice. ``-1`` marks
            an empty slot (a row of the batch with fewer tokens than its neighbours); empty slots come first.
        bytes_scored: bytes that were read from the cache to make this choice.
        key_positions: int64, same shape as ``indices``: where the chosen keys are to stand for this step; None keeps
            them where they were written.
        query_shift: int64 ``(batch,)``, with ``key_positions``: how far the queries move along.
    """

    indices: torch.Tensor
    bytes_scored: int = 0
    key_positions: torch.Tensor | None = None
    query_shift: torch.Tensor | None = None

    @property
    def kept(self) -> int:
        return self.indices.shape[-1]
