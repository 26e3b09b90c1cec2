"""PyramidDrop: fewer picture tokens from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.registry import register
from laconic.vision.inside import StagedMethod, attention_of_last


@register
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedMethod):
    """Cuts the layers into stages and keeps the same share of a picture at the end of each, by the last token's attention.

    The budget is the mean over the layers. The share follows from it: with four stages and a budget of 47 % each stage keeps
    half of the one before, as in the paper. Where a budget is too small for that, the first stages become shorter.
    """

    id: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop: Accelerating Your LVLMs via Pyramid Visual Redundancy Reduction (2024)"

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return attention_of_last(layer, call)
