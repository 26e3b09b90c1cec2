"""SparseVLM: only words that look at the picture vote for its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.inside import InsideMethod, by_words
from laconic.vision.schedule import falling


@register
@dataclass(frozen=True, kw_only=True)
class SparseVLM(InsideMethod):
    """Keeps the picture tokens that the good raters among the words attend to: those that look at the picture more than the mean.

    A word's look is the attention that it gives to all entries together, of which the picture's part decides whether it rates.
    The budget is the mean over the layers, in stages that each keep the same share. The source recycles what it drops into a few
    merged tokens and finds its raters by embeddings before the first layer; both are left out here.
    """

    id: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (2024)"

    stages: int = parameter(4, "groups of layers that see the same tokens", least=2, search=(3, 6))

    def stays(self, n: int, layers: int) -> dict[int, int]:
        return falling(self.budget, n, layers, self.stages)

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return by_words(layer, call, raters_vote)


def raters_vote(attention: torch.Tensor) -> torch.Tensor:
    """Sum over the words that attend to anything more strongly than the mean word does, of ``attention`` (words, n): ``(n,)``."""
    looks = attention.amax(-1)
    return attention[looks >= looks.mean() - 1e-9].sum(0)
