"""Withdrawal: late in the language model all picture tokens leave, once nobody looks at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import InsideMethod, attention_of, everything, pictures_in, words_behind
from laconic.vision.schedule import layer_at


@register
@dataclass(frozen=True, kw_only=True)
class Withdraw(InsideMethod):
    """Drops all picture tokens after one late layer if words hardly look at them there; otherwise drops none.

    How much is the attention that its tokens receive from the words behind it, of all that these give, mean over heads. Below
    ``threshold`` the picture leaves: no deeper layer computes or holds any of it, not while the answer is written either. With
    ``threshold=1`` it always leaves, as in Visual Token Withdrawal (2024); ``laconic explain horizon`` measures after which share
    of the layers. Takes no budget.
    """

    id: ClassVar[str] = "withdraw"
    paper: ClassVar[str] = "ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient LVLMs (2025)"
    takes_budget: ClassVar[bool] = False
    claims: ClassVar[tuple[Claim, ...]] = ()

    at: float = parameter(0.875, "after this share of the layers", least=0, search=(0.75, 0.5))
    threshold: float = parameter(0.1, "attention below which a picture leaves", least=0, search=())

    def check(self) -> None:
        self.require(self.budget.is_full, "it drops all or nothing, so it takes no budget.")
        self.require(0 < self.at < 1, "at is a share of the layers: give more than 0 and less than 1.")

    def leave(self, layer: KVLayer, call: Call) -> None:
        if layer.index != layer_at(self.at, layer.layers):
            return
        stays = everything(layer)
        for picture in pictures_in(layer):
            given, _ = attention_of(layer, call, picture.row, words_behind(layer, picture))
            if float(given[:, picture.slots].sum(-1).mean()) < self.threshold:
                stays[picture.row, picture.slots] = False
        if not bool(stays.all()):
            self.go_on(layer, stays)
