"""Tokens at even distances: a choice that looks at nothing, and is hard to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.claims import Claim
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.picture import Picture
from laconic.vision.select import spread


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(VisionMethod):
    """Keeps tokens at even distances in the order of the prompt, row by row.

    Token number floor((i + 0.5) * n / k) for i from 0 to k - 1, so that the distances differ by at most one.
    """

    id: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"
    claims: ClassVar[tuple[Claim, ...]] = ()

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        return spread(picture.cells, k)
