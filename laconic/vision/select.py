"""Which tokens of one picture stay. All give int64 tokens in ascending order, ties to the lower."""

from __future__ import annotations

import torch

from laconic.vision.picture import Picture


def top(scores: torch.Tensor, k: int, among: torch.Tensor) -> torch.Tensor:
    """The ``k`` best of the tokens ``among`` (c,) by ``scores`` (n,)."""
    order = scores.float()[among].argsort(descending=True, stable=True)
    return among[order[:k]].sort().values


def candidates(picture: Picture) -> torch.Tensor:
    """The tokens that compete, boolean ``(n,)``: all but separators."""
    return ~picture.layout.separators.to(picture.features.device)


def spread(among: torch.Tensor, k: int) -> torch.Tensor:
    """``k`` of the tokens ``among`` (c,) at even distances: number floor((i + 0.5) c / k) for i from 0 to k - 1."""
    at = torch.arange(k, device=among.device, dtype=torch.float64)
    return among[((at + 0.5) * len(among) / k).long()]
