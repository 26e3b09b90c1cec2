"""ZeroTuning: how much the first token weighs sharpens or flattens all other attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import Call, ReweightMethod
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class ZeroTuning(ReweightMethod):
    """Multiplies the attention to the first token by ``gamma`` and divides all by their new sum, in prompts and in steps.

    The same as adding log(gamma) to its logit. Below 1, what the first token soaked up goes to the others in proportion;
    above 1 it soaks up more. Which helps depends on the task and the heads, so there is no good default but 1, which
    changes nothing: search gamma on examples of your own. It works as far as the model has a sink on its first token (see
    ``laconic explain sinks``). Together with a method that evicts, let that one keep the first token (``sinks``).
    """

    id: ClassVar[str] = "zerotuning"
    paper: ClassVar[str] = "ZeroTuning: Unlocking the Initial Token's Power to Enhance LLMs Without Training (2025)"

    gamma: float = parameter(1.0, "what the weight of the first token is multiplied by; above 0", search=(0.25, 0.5, 2.0, 4.0))
    heads: str = parameter("all", "query heads that are tuned in every layer: all, or their numbers, such as 0;3;5")

    def check(self) -> None:
        super().check()
        self.require(self.gamma > 0, "gamma must be above 0: at 0 the first token would see nothing.")
        numbers = self.heads.split(";")
        self.require(self.heads == "all" or all(n.strip().isdigit() for n in numbers), "heads is 'all' or numbers such as 0;3;5.")

    def columns(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if self.gamma == 1.0:
            return None
        return layer.slots_of(torch.zeros(layer.keys.shape[0], 1, 1, dtype=torch.int64, device=layer.keys.device))

    def reweight(
        self, layer: KVLayer, output: torch.Tensor, weights: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        more = torch.zeros(output.shape[1], device=output.device)
        chosen = range(len(more)) if self.heads == "all" else [int(n) for n in self.heads.split(";")]
        self.require(max(chosen) < len(more), f"heads={self.heads} names head {max(chosen)}, but there are {len(more)}.")
        more[list(chosen)] = self.gamma - 1.0
        change = weights * more[:, None, None]
        return (output + change @ values) / (1 + change.sum(-1, keepdim=True))
