"""Which tokens of one picture stay. All give int64 tokens in ascending order, ties to the lower."""

from __future__ import annotations

import torch


def top(scores: torch.Tensor, k: int, among: torch.Tensor) -> torch.Tensor:
    """The ``k`` best of the tokens ``among`` (c,) by ``scores`` (n,)."""
    order = scores.float()[among].argsort(descending=True, stable=True)
    return among[order[:k]].sort().values
