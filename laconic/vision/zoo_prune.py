"""ZOO-Prune: tokens to which the projector reacts, and that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.picture import Picture
from laconic.vision.select import different


@register
@dataclass(frozen=True, kw_only=True)
class ZOOPrune(VisionMethod):
    """Keeps tokens to which the projector reacts strongly and that differ from those already kept.

    A token's sensitivity is how far its projection moves when its encoder features are nudged, both ways, in ``directions``
    random directions by ``step`` (the patches of one token all alike): the norm of the Jacobian, without a gradient. It is scaled
    to 0..1 over the picture and multiplied by the distance to the nearest kept token; the first is the most sensitive. Costs
    twice ``directions`` passes through the projector. A linear projector reacts to all tokens alike: what is left then is
    diversity.
    """

    id: ClassVar[str] = "zoo_prune"
    paper: ClassVar[str] = "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models (2025)"

    directions: int = parameter(64, "random directions", least=1, search=(16,))
    step: float = parameter(0.01, "length of a nudge", least=1e-6, search=())
    seed: int = parameter(0, "of the random directions", search=())

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        return different(picture, self.sensitivity(picture), k, picture.cells)  # the most sensitive first

    def sensitivity(self, picture: Picture) -> torch.Tensor:
        """Mean norm of the projection's change per unit of nudge, float32 ``(n,)``; 0 for separators."""
        given = picture.projector_input()
        generator = torch.Generator().manual_seed(self.seed)
        total = None
        for _ in range(self.directions):
            nudge = torch.nn.functional.normalize(torch.randn(given.shape[-1], generator=generator), dim=0)
            nudge = (self.step * nudge).to(given)
            change = (picture.project(given + nudge) - picture.project(given - nudge)).norm(dim=-1) / (2 * self.step)
            total = change if total is None else total + change
        return picture.of_inputs(total / self.directions)
