"""ACT: sinks in the middle of a prompt give most of their weight back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call, ReweightMethod
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.primitives.scores import attention_received
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class ACT(ReweightMethod):
    """Finds tokens that draw much attention from all over the prompt, the first one apart, and takes most of it from them.

    A sink is a token whose mean attention, over the queries that can see it, exceeds ``threshold`` / n. Per KV head, up to
    ``most`` of them keep the share ``beta`` of their weight in every row; what they lose goes to all other tokens in proportion
    to what these have. Sinks are found in the prompt, from the attention as it is, and stay those for the answer. The first
    and last layers are left as they are. Gains, where there are any, are small: measure on examples of your own.
    """

    id: ClassVar[str] = "act"
    paper: ClassVar[str] = "Unveiling and Harnessing Hidden Attention Sinks: Enhancing LLMs through Attention Calibration (2024)"

    beta: float = parameter(0.4, "share of its weight that a sink keeps; 1 changes nothing", least=0)
    threshold: float = parameter(5.0, "a sink draws more than this many times the even share 1 / n", least=1)
    most: int = parameter(8, "sinks per KV head at most", least=1)
    skip: int = parameter(2, "layers at the beginning that are left alone, and the last", least=0)

    def check(self) -> None:
        super().check()
        self.require(self.beta <= 1, "beta is a share: give a number up to 1.")

    def columns(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if self.beta == 1 or layer.index < self.skip or layer.index == layer.layers - 1:
            return None
        if not call.decoding:
            layer.memory[self.id] = self._sinks(layer, call)
        found = layer.memory.get(self.id)
        return None if found is None else layer.slots_of(found)

    def _sinks(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """True positions of the sinks, ``(batch, kv_heads, most)``, -1 where there are fewer."""
        received = attention_received(
            call.query, layer.keys, scale=call.scale, softcap=call.softcap, starts=layer.starts(), window=call.window
        )
        n, new = layer.n, call.query.shape[2]
        seers = (n - torch.arange(n, device=received.device)).clamp(max=new)
        positions = layer.positions
        mean = (received / seers).masked_fill(positions <= 0, 0.0)  # the first token is no sink, nor is padding
        best, at = mean.topk(min(self.most, n), dim=-1)
        length = layer.lengths[:, None, None].clamp(min=1)
        return positions.gather(2, at).masked_fill(best <= self.threshold / length, -1).sort(dim=-1).values

    def reweight(
        self, layer: KVLayer, output: torch.Tensor, weights: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        part, mass = weights @ values, weights.sum(-1, keepdim=True)
        rest = 1 - mass
        alone = rest < 1e-6  # nothing but sinks in sight: the row stays as it is
        grown = (1 - self.beta * mass) / rest.clamp(min=1e-6)
        return torch.where(alone, output, self.beta * part + grown * (output - part))
