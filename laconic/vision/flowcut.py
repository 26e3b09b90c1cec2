"""FlowCut: patches leave inside the vision encoder, by what flows out of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.picture import Picture
from laconic.vision.thinning import LEFT, Flow, Thinning


@register
@dataclass(frozen=True, kw_only=True)
class FlowCut(VisionMethod):
    """Lets patches leave between the blocks of the vision encoder, so that the encoder itself gets cheaper.

    A patch is worth what the class token (the mean query where there is none) gives to it, plus how like its value is to that
    token's, times the length of its value; the worth runs on from block to block. Every second block some leave: more of them the
    more the attention is gathered in a few patches. Of a picture that comes in several crops each crop keeps its share in the
    encoder, and the budget is then met by the same worth. The source's further drop inside the language model, for such
    pictures, is left out: ``flowcut:50% + fastv:10%`` has one of that kind. Blocks whose patches see a window of the picture only
    (Qwen2.5-VL) are neither measured nor counted. The released code lets as many patches leave every
    crop that the encoder sees together as leave the one that loses most: ``faithful_code`` does so too.
    """

    id: ClassVar[str] = "flowcut"
    paper: ClassVar[str] = "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models (2025)"
    thins: ClassVar[type | None] = Thinning

    keep_old: float = parameter(0.5, "share of the worth so far in the running worth", least=0, search=(0.3, 0.7))
    every: int = parameter(2, "patches leave every so many blocks", least=1, search=(1,))
    faithful_code: bool = parameter(False, "as released: all crops of a batch lose as much as the one with most", search=())

    @property
    def together(self) -> bool:
        """Whether all crops that the encoder sees at once lose as many patches."""
        return self.faithful_code

    def check(self) -> None:
        super().check()
        self.require(self.keep_old < 1, "keep_old is a share below 1.")

    def score(self, picture: Picture) -> torch.Tensor:
        return picture.of_patches(picture.recorded(LEFT.kind, LEFT.layer), "sum")

    def patch_worth(self, flow: Flow) -> torch.Tensor:
        """Worth of the patches in one block."""
        shares = (part / part.sum(-1, keepdim=True).clamp(min=1e-12) for part in (flow.attention, flow.likeness))
        return sum(shares) * flow.strength

    def running(self, before: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
        """The running worth after a further block."""
        return self.keep_old * before + (1 - self.keep_old) * worth

    def leaving(self, left: int, target: int, blocks: int, attention: torch.Tensor) -> int:
        """A share of what must leave, ``blocks`` before the last drop: all where attention rests on one patch, none where it is
        even; what is left to leave goes at the last drop."""
        if blocks == 0:
            return left - target
        if blocks % self.every or left <= 1:
            return 0
        p = attention / attention.sum().clamp(min=1e-12)
        entropy = float(torch.special.entr(p).sum()) / math.log(left)
        return round((left - target) / math.sqrt(blocks) * max(0.0, 1 - entropy**2))
