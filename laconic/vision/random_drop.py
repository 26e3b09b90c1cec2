"""Random tokens between layers: where single tokens tell nothing any more, no score is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import InsideMethod, pictures_in
from laconic.vision.schedule import layer_at
from laconic.vision.select import drawn


@register
@dataclass(frozen=True, kw_only=True)
class RandomDrop(InsideMethod):
    """Keeps, after half of the layers, picture tokens at random, of those that are still there; the same seed keeps the same.

    The budget is what is left of a picture after this share ``at`` of the layers. Deep in a model scores choose no better than
    chance: ``laconic explain horizon`` shows from where on single tokens tell nothing. The source's schedule is a method before
    the first layer, a random drop, and all dropped at the horizon: ``divprune:50% + random_drop:25% + withdraw(threshold=1)``.
    It does not say after which layer it drops at random; half is our choice.
    """

    id: ClassVar[str] = "random_drop"
    paper: ClassVar[str] = "All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs (2025)"
    claims: ClassVar[tuple[Claim, ...]] = ()

    at: float = parameter(0.5, "after this share of the layers", least=0, search=(0.25, 0.75))
    seed: int = parameter(0, "of the random numbers", search=())

    def check(self) -> None:
        super().check()
        self.require(0 < self.at < 1, "at is a share of the layers: give more than 0 and less than 1.")

    def stays(self, n: int, given: tuple[int, ...]) -> dict[int, int]:
        return {layer_at(self.at, len(given)): self.budget.tokens(n)}

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        worth = torch.zeros(layer.shared_positions[:, 0].shape, device=call.query.device)
        for picture in pictures_in(layer):
            numbers = drawn(self.seed, picture.number, picture.size).to(worth.device)
            worth[picture.row, picture.slots] = numbers[picture.places]
        return worth
