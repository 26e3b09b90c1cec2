"""VTC-CLS: the tokens that the encoder's class token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture


@register
@dataclass(frozen=True, kw_only=True)
class VTCCLS(VisionMethod):
    """Keeps the tokens to which the class token of the vision encoder attends most, summed over several blocks.

    Attention is divided among all tokens of the encoder and is the mean over heads. Of ``blocks`` from the end the last one is
    left out: the language model sees the block before it. One block (``first=-2``) is FasterVLM (2024). Knows no question.
    """

    id: ClassVar[str] = "vtc_cls"
    paper: ClassVar[str] = "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (2024)"

    first: int = parameter(-8, "first block that is summed, from the end; as many as the encoder has at most", search=(-2, -4))

    def check(self) -> None:
        super().check()
        self.require(self.first <= -2, f"first={self.first} names no block before the last: give -2 or less.")

    def wants(self, depth: int) -> set[Want]:
        return {Want("cls", layer) for layer in self.layers(depth)}

    def layers(self, depth: int) -> range:
        """Blocks that are summed, from the end: of an encoder of ``depth`` blocks all but the first at most."""
        return range(max(self.first, min(1 - depth, -2)), -1)

    def score(self, picture: Picture) -> torch.Tensor:
        return sum(picture.cls(layer) for layer in self.layers(picture.trace.depth))
