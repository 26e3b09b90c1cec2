"""Which tokens of one picture stay. All give int64 tokens in ascending order, ties to the lower."""

from __future__ import annotations

import torch

from laconic.primitives.greedy import Rule, greedy
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


def pick(picture: Picture, rows: torch.Tensor, k: int, rule: Rule, first: int | torch.Tensor | None = None) -> torch.Tensor:
    """``k`` competing tokens, one by one as the rule says, of what it reads of each (n, d), beginning with ``first``."""
    seed = None if first is None else torch.as_tensor(first, device=rows.device).view(1)
    quota = torch.tensor([k], device=rows.device)
    return greedy(rows[None], quota, rule, seed=seed, valid=candidates(picture)[None])[0]
