"""Looking at what a model does: dense attention whose every call is watched, as calibration needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch

from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.cache import KVLayer
from laconic.recipe import Recipe


class Probe(Policy):
    """A policy of dense attention that looks at every call of every layer. A subclass writes ``look``.

    Attributes:
        found: what ``look`` has found out, by layer.
    """

    def __init__(self) -> None:
        super().__init__(Recipe.parse("dense").methods)
        self.found: dict[int, Any] = {}

    def look(self, layer: KVLayer, call: Call) -> None:
        """Called after each attention call; the layer holds the keys and values of its tokens."""
        raise NotImplementedError

    def attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
        output = super().attend(layer, call)
        self.look(layer, call)
        return output

    def read(self, model: torch.nn.Module, texts: Sequence[torch.Tensor]) -> Self:
        """Runs ``model`` over token ids, one 1-D tensor per text."""
        from laconic.hooks import apply

        for ids in texts:
            with apply(model, "dense") as handle, torch.no_grad():
                handle.policy = self
                model(ids[None].to(model.device), use_cache=True, logits_to_keep=1)
        return self

    @property
    def layers(self) -> list[Any]:
        """What was found, in the order of the layers."""
        return [self.found[index] for index in sorted(self.found)]
