"""FastV: after a few layers, the picture tokens that the last token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import InsideMethod, attention_of_last


@register
@dataclass(frozen=True, kw_only=True)
class FastV(InsideMethod):
    """Keeps, after the first layers, the picture tokens to which the prompt's last token attends most there.

    The budget is what is left of a picture after ``layers`` layers, which compute all of it. Attention is the mean over heads in
    the last of these layers. Late tokens draw more of it than early ones whatever they show (see ``attention_debias``).
    """

    id: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for LVLMs (2024)"

    layers: int = parameter(2, "layers that see the whole picture", least=1, search=(1, 3))

    def stays(self, n: int, given: tuple[int, ...]) -> dict[int, int]:
        return {min(self.layers, len(given) - 1) - 1: self.budget.tokens(n)}

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return attention_of_last(layer, call)
