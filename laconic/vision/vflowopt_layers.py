"""VFlowOpt inside the language model: the encoder's map goes on deciding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.encoder import Want
from laconic.vision.inside import StagedMethod, pictures_in
from laconic.vision.vflowopt import MAP_WANTS, sink_map


@register
@dataclass(frozen=True, kw_only=True)
class VFlowOptLayers(StagedMethod):
    """Drops picture tokens after each third of the language model by the map that ``vflowopt`` makes of the vision encoder.

    The map is what the picture's own sinks attend to, so that neither the question nor the language model has a say, and nothing
    is measured there. A token that has taken others in counts by its own place in the map. The budget is the mean over the
    layers, in stages that each keep the same share; the source searches the shares for a model, under the same mean.
    ``vflowopt:30% + vflowopt_layers:25%`` is the whole of it.
    """

    id: ClassVar[str] = "vflowopt_layers"
    paper: ClassVar[str] = "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization (2025)"

    stages: int = parameter(3, "groups of layers that see the same tokens", least=2, search=(2, 4))
    sinks: float = parameter(4.0, "times the mean attention from which a token votes", least=0, search=(0.0, 2.0, 10.0, 30.0))

    def wants(self, depth: int) -> set[Want]:
        return MAP_WANTS

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        worth = torch.zeros(layer.shared_positions[:, 0].shape, device=call.query.device)
        for held in pictures_in(layer):
            picture = layer.request.looked[held.number]
            worth[held.row, held.slots] = sink_map(picture, self.sinks)[picture.cells][held.places].to(worth)
        return worth
