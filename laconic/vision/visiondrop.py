"""VisionDrop: pictures reduce themselves, without the words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.primitives.merge import Merge, join_nearest
from laconic.registry import register
from laconic.vision.inside import Entries, StagedMethod, attention_of, best, mean_keys, only, pictures_in
from laconic.vision.select import spread

ROWS = 256  # queries whose attention is held at a time


@register
@dataclass(frozen=True, kw_only=True)
class VisionDrop(StagedMethod):
    """Keeps the picture tokens that the picture's own tokens attend to, and merges the others into a few, stage by stage.

    Attention from picture to picture is the mean over heads and over its tokens. As a token is seen only by later ones, early
    tokens would win: each row is taken over the picture's tokens that it sees and weighed by their number, and a token's sum is
    divided by how many see it, so that even attention gives everyone 1. Words that come after a picture never
    change what is kept of it, so that a second question finds what the first one had. Of what stays, the share ``contextual`` are
    tokens at even distances among the others, each the mean of the hidden states of itself and of those whose keys are most like
    its own. The released code weighs neither rows nor columns, and adds to a contextual token the mean of those that join it,
    which doubles its length: ``faithful_code`` does so too. The budget is the mean over the layers, contextual tokens included.
    The source's first stage, in the vision encoder, is ``visionzip``: ``visionzip:33% + visiondrop:11%``.
    """

    id: ClassVar[str] = "visiondrop"
    paper: ClassVar[str] = "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment (2025)"
    verbs: ClassVar[tuple[str, ...]] = ("drop", "merge")

    contextual: float = parameter(0.15, "share of what stays that are merged tokens", least=0, search=(0.0, 0.3))
    faithful_code: bool = parameter(False, "as released: early tokens have the advantage, and merged ones add up", search=())

    @property
    def adds(self) -> bool:
        return self.faithful_code

    def check(self) -> None:
        super().check()
        self.require(self.contextual < 1, "contextual is a share of what stays: give less than 1.")

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        worth = torch.zeros(layer.shared_positions[:, 0].shape, device=call.query.device)
        for picture in pictures_in(layer):
            worth[picture.row, picture.slots] = self.received(layer, call, picture.row, picture.slots)
        return worth

    def reduce(self, layer: KVLayer, picture: Entries, worth: torch.Tensor, k: int) -> Merge:
        few = min(round(self.contextual * k), k - 1)
        into = only(best(worth, k - few), len(worth))
        if few:
            rest = (into < 0).nonzero()[:, 0]
            targets = spread(rest, few)
            into[targets] = targets
            movers = rest[into[rest] < 0]
            into[movers] = join_nearest(mean_keys(layer, picture), targets, movers)
        return Merge(into)

    def received(self, layer: KVLayer, call: Call, row: int, own: torch.Tensor) -> torch.Tensor:
        """What the picture's entries ``own`` (c,) receive from each other, ``(c,)``."""
        total, viewers = (torch.zeros(len(own), device=own.device) for _ in range(2))
        for begin in range(0, len(own), ROWS):
            given, seen = (part[:, own] for part in attention_of(layer, call, row, own[begin : begin + ROWS]))
            if not self.faithful_code:
                given = given / given.sum(-1, keepdim=True).clamp(min=1e-12) * seen.sum(-1, keepdim=True)
            total += given.sum(0)
            viewers += seen.sum(0)
        return total / (len(own) if self.faithful_code else viewers)
