"""SparseVLM: only words that look at the picture vote for its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.registry import register
from laconic.vision.inside import StagedMethod, by_words


@register
@dataclass(frozen=True, kw_only=True)
class SparseVLM(StagedMethod):
    """Keeps the picture tokens that the good raters among the words attend to: those that look at the picture more than the mean.

    A word's look is the attention that it gives to the picture's tokens together. The budget is the mean over the layers, in
    stages that each keep the same share. The source recycles what it drops into a few merged tokens and finds its raters by
    embeddings before the first layer; both are left out here.
    """

    id: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (2024)"

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return by_words(layer, call, raters_vote)


def raters_vote(attention: torch.Tensor) -> torch.Tensor:
    """Sum of ``attention`` (words, c) over the words that give the picture as much as the mean word does: ``(c,)``."""
    looks = attention.sum(-1)
    return attention[looks >= looks.mean() - 1e-9].sum(0)
