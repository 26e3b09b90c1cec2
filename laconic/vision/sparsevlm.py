"""SparseVLM: only words that resemble the picture vote for its tokens, and the best of the others are recycled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import WORD, KVLayer
from laconic.method import parameter
from laconic.primitives.merge import Merge, density_peaks
from laconic.registry import register
from laconic.vision.inside import Entries, StagedMethod, best, by_words, mean_keys, only, words_behind
from laconic.vision.picture import Picture

TOGETHER = 10  # recycled tokens for each one that they become


@register
@dataclass(frozen=True, kw_only=True)
class SparseVLM(StagedMethod):
    """Keeps the picture tokens that the good raters among the words attend to, and recycles the best of the others into a few.

    Raters are the words behind the picture that resemble it at least as much as their mean does: products of embeddings before
    the first layer, softmax over the words, mean over the picture's tokens. Their attention is summed in the layer of the drop.
    Of what does not go on, the best ``recycle`` join others: about ten together become one token, the mean of their hidden
    states, where the middle of the group stands. Groups lie around peaks of density. The source groups hidden states; here it is
    keys, which are at hand where the choice is made. Recycled tokens are part of the budget, which is the mean over the layers,
    in stages that each keep the same share. The source may also choose by the rank of the attention how many go.
    """

    id: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (2024)"
    verbs: ClassVar[tuple[str, ...]] = ("drop", "merge")

    recycle: float = parameter(0.3, "share of the tokens that leave which are merged into a few", least=0, search=(0.0, 0.6))

    def check(self) -> None:
        super().check()
        self.require(self.recycle <= 1, "recycle is a share of what leaves: give at most 1.")

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return by_words(layer, call, lambda attention: attention.sum(0), raters)

    def reduce(self, layer: KVLayer, picture: Entries, worth: torch.Tensor, k: int) -> Merge:
        joining = round(self.recycle * (len(worth) - k))
        groups = min(math.ceil(joining / TOGETHER), k - 1)
        into = only(best(worth, k - groups), len(worth))
        if groups:
            left = worth.masked_fill(into >= 0, float("-inf"))
            recycled = best(left, joining + groups)
            into[recycled] = recycled[density_peaks(mean_keys(layer, picture)[recycled], groups)[1]]
        return Merge(into)


def raters(layer: KVLayer, picture: Entries) -> torch.Tensor:
    """The entries of the words behind a picture that resemble it, int64 ``(w,)``; of all words where nothing tells."""
    request, words = layer.request, words_behind(layer, picture)
    good = resembling(request.looked[picture.number])
    if not len(good):
        return words
    kinds = request.pictures[picture.row, : int(request.positions[picture.row, -1]) + 1]
    behind = (kinds == WORD).nonzero()[-len(good) :, 0].to(good.device)  # words may have left on the way: go by positions
    chosen = words[torch.isin(layer.shared_positions[picture.row, 0, words], behind[good])]
    return chosen if len(chosen) else words


def resembling(picture: Picture) -> torch.Tensor:
    """Which of the words behind a picture resemble it at least as much as their mean does: boolean ``(w,)``."""
    words = picture.text[picture.after].float()
    likeness = (picture.features[picture.cells].float() @ words.t()).softmax(-1).mean(0)
    return likeness >= likeness.mean() - 1e-6
