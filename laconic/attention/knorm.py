"""Key norm: small keys stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.primitives.scores import key_norm
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class KNorm(EvictMethod):
    """Keeps the keys of smallest Euclidean norm.

    In trained models a small key norm goes with high attention. It needs no query and no attention, so it costs one read
    of the keys.
    """

    id: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("keydiff"))

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return key_norm(layer.keys)
