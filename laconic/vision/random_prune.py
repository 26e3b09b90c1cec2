"""Random tokens: what any choice must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.claims import Claim
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.picture import Picture


@register
@dataclass(frozen=True, kw_only=True)
class RandomPrune(VisionMethod):
    """Keeps tokens at random, each set of them as likely as any other; the same seed keeps the same.

    Every picture of a prompt gets numbers of its own.
    """

    id: ClassVar[str] = "random_prune"
    paper: ClassVar[str] = "All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs (2025)"
    claims: ClassVar[tuple[Claim, ...]] = ()

    seed: int = parameter(0, "of the random numbers", search=())

    def score(self, picture: Picture) -> torch.Tensor:
        return drawn(self.seed, picture.number, len(picture.layout)).to(picture.features.device)


def drawn(seed: int, number: int, n: int) -> torch.Tensor:
    """A random number for each of ``n`` tokens of one picture, float ``(n,)``: of the seed and the picture's number."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
