"""KeyDiff: keys that differ from the others stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.primitives.scores import key_novelty
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class KeyDiff(EvictMethod):
    """Keeps the keys that point away from the mean direction of all keys of their head.

    Keys that resemble each other stand for each other; the odd ones carry what is special. It needs no query, so the
    question does not matter, and costs one read of the keys. The mean is over what the layer holds at the time.
    """

    id: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference (2025)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("knorm"))

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return key_novelty(layer.keys, layer.starts(call.window))
