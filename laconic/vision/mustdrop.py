"""MustDrop: key tokens never go; others go when the words look at them neither together nor one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.encoder import Want
from laconic.vision.inside import StagedMethod, by_words, everything, pictures_in
from laconic.vision.select import top


@register
@dataclass(frozen=True, kw_only=True)
class MustDrop(StagedMethod):
    """Drops picture tokens that neither all words together nor any one word looks at, stage by stage, but never key tokens.

    Key tokens are what the vision encoder's last block attends to most. Two thresholds decide in the source, on a token's share
    of the words' attention to the picture and on the most that one word gives it; both are scaled alike until the budget is met,
    which is to rank by the larger of the two ratios. The budget is the mean over the layers. After the last drop, the layers
    since the first one forget what is gone by then, for the steps to come. The source's first stage, which merges like neighbours
    in the vision encoder, is ``window_merge``: ``window_merge:50% + mustdrop:20%``.
    """

    id: ClassVar[str] = "mustdrop"
    paper: ClassVar[str] = "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model (2024)"

    key_share: float = parameter(0.08, "share of a picture's tokens that are key tokens", least=0, search=(0.04, 0.15))
    all_words: float = parameter(0.001, "threshold on the share of all words' attention", least=1e-9, search=())
    one_word: float = parameter(0.001, "threshold on the most attention of one word", least=1e-9, search=())
    cut: bool = parameter(True, "let the layers between the drops forget what is gone after the last one")

    def check(self) -> None:
        super().check()
        self.require(self.key_share <= 1, "key_share is a share: give at most 1.")

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", -1)}

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        def larger(attention: torch.Tensor) -> torch.Tensor:
            together = attention.sum(0)
            return torch.maximum(together / self.all_words, attention.amax(0) / self.one_word)

        return by_words(layer, call, larger).masked_fill(self.key_entries(layer), float("inf"))

    def key_entries(self, layer: KVLayer) -> torch.Tensor:
        """The entries of the key tokens, boolean ``(batch, n)``: no more of a picture than its last stage keeps."""
        keys = ~everything(layer)
        for held in pictures_in(layer):
            picture = layer.request.looked[held.number]
            left = min(self.plan(layer.request, held.size, held.given).values())
            count = min(math.ceil(self.key_share * held.size - 1e-9), left)
            best = torch.searchsorted(picture.cells, top(picture.salience(-1), count, picture.cells))
            keys[held.row, held.slots] = torch.isin(held.places, best)
        return keys

    def go_on(self, layer: KVLayer, stays: torch.Tensor) -> None:
        super().go_on(layer, stays)
        held = next(pictures_in(layer))
        drops = list(self.plan(layer.request, held.size, held.given))
        if not self.cut or layer.index != max(drops):
            return
        left = layer.shared_positions[:, 0].masked_fill(~stays, -1)
        for earlier in layer.request.layers[min(drops) + 1 : layer.index + 1]:
            at = earlier.shared_positions[:, 0]
            keep = torch.stack([torch.isin(a, p[p >= 0]) for a, p in zip(at, left, strict=True)])
            order = keep.to(torch.int8).argsort(dim=-1, stable=True)
            earlier.keep(order.masked_fill(~keep.gather(1, order), -1)[:, None])
