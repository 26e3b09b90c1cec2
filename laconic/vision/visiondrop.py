"""VisionDrop: pictures reduce themselves, without the words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.primitives.scores import capped
from laconic.registry import register
from laconic.vision.inside import InsideMethod, picture_numbers
from laconic.vision.schedule import falling

ROWS = 256  # queries whose attention is held at a time


@register
@dataclass(frozen=True, kw_only=True)
class VisionDrop(InsideMethod):
    """Keeps the picture tokens that the picture's own tokens attend to, at the end of each stage of layers.

    Attention from picture to picture is the mean over heads and over its tokens. As a token is seen only by later ones, early
    tokens would win: each row is taken over the picture's tokens that it sees and weighed by their number, and a token's sum is
    divided by how many see it, so that even attention gives everyone 1 (``correct=false``: as released). Words that come after a
    picture never change what is kept of it, so that a second question finds what the first one had. The budget is the mean over
    the layers. The source also keeps merged tokens at each stage; before the first layer ``visionzip`` does that: ``visionzip:33%
    + visiondrop:11%``.
    """

    id: ClassVar[str] = "visiondrop"
    paper: ClassVar[str] = "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment (2025)"

    stages: int = parameter(4, "groups of layers that see the same tokens", least=2, search=(3, 6))
    correct: bool = parameter(True, "weigh rows and columns so that early tokens have no advantage")

    def stays(self, n: int, layers: int) -> dict[int, int]:
        return falling(self.budget, n, layers, self.stages)

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        numbers = picture_numbers(layer)
        worth = torch.zeros(numbers.shape, device=numbers.device)
        for picture in numbers.unique().tolist():
            if picture >= 0:
                row = int((numbers == picture).any(-1).nonzero()[0])
                own = (numbers[row] == picture).nonzero()[:, 0]
                worth[row, own] = self.received(layer, call, row, own)
        return worth

    def received(self, layer: KVLayer, call: Call, row: int, own: torch.Tensor) -> torch.Tensor:
        """What the picture's entries ``own`` (c,) receive from each other, ``(c,)``."""
        first = layer.n - call.query.shape[2]
        stop = int(own[-1]) + 1
        keys, real = layer.keys[row, :, :stop].float(), layer.shared_positions[row, 0, :stop] >= 0
        total = torch.zeros(len(own), device=own.device)
        for begin in range(0, len(own), ROWS):
            rows = own[begin : begin + ROWS]
            query = call.query[row, :, rows - first].float().unflatten(0, (layer.heads, -1))
            logits = capped(torch.einsum("kgwd,knd->kgwn", query, keys) * call.scale, call.softcap)
            seen = (torch.arange(stop, device=own.device) <= rows[:, None]) & real
            part = logits.masked_fill(~seen, float("-inf")).softmax(-1).mean((0, 1))[:, own]
            if self.correct:
                part = part / part.sum(-1, keepdim=True).clamp(min=1e-12) * (own <= rows[:, None]).sum(-1, keepdim=True)
            total += part.sum(0)
        viewers = torch.arange(len(own), 0, -1, device=own.device)
        return total / viewers if self.correct else total / len(own)
