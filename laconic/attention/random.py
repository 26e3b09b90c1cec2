"""Random eviction: the floor that a score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.scores import hashed_uniform
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Random(EvictMethod):
    """Keeps a random set per KV head and layer, besides the first and newest tokens.

    Every position has a fixed random worth, so that runs repeat and the sets of smaller budgets lie inside those of
    larger ones.
    """

    id: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"
    claims: ClassVar[tuple[Claim, ...]] = ()
    reads_keys: ClassVar[bool] = False

    seed: int = parameter(0, "which random numbers")

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return hashed_uniform(layer.positions, self.seed * 1009 + layer.index)
