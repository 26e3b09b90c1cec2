"""Feed-forward parts that compute only the neurons that matter to a prompt, while its answer is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from laconic.cache import Request
from laconic.errors import LaconicError
from laconic.layers import decoder_layers
from laconic.vision.watch import find_part
from laconic.wrap import join, leave

CHOSEN = "neurons.chosen"  # in a layer's memory, boolean (batch, neurons): what a method wants steps to compute
GATHERED = "neurons.gathered"  # what became of it: the weights of these


@dataclass(frozen=True)
class Neurons:
    """Some neurons of a gated feed-forward part: copies of their rows and columns, for all rows of a batch together.

    Attributes:
        chosen: boolean ``(batch, k)``: the neurons of each row of the batch; the others give 0 there.
        gate, up, down: weight and bias (or None) of ``(k, dim)``, ``(k, dim)`` and ``(dim, k)``.
        activation: what the gate passes.
        prompt: tokens that there were when they were chosen.
    """

    chosen: torch.Tensor
    gate: tuple[torch.Tensor, torch.Tensor | None]
    up: tuple[torch.Tensor, torch.Tensor | None]
    down: tuple[torch.Tensor, torch.Tensor | None]
    activation: Callable[[torch.Tensor], torch.Tensor]
    prompt: int = 0

    @classmethod
    def of(cls, part: torch.nn.Module, chosen: torch.Tensor, prompt: int = 0) -> Neurons:
        """Those of a feed-forward ``part`` that any row of ``chosen`` (batch, neurons) has, for a prompt of so many tokens."""
        union = chosen.any(0).nonzero()[:, 0]
        gate, up = ((p.weight.detach()[union], _some(p.bias, union)) for p in (part.gate_proj, part.up_proj))
        down = part.down_proj.weight.detach()[:, union], _some(part.down_proj.bias, slice(None))
        return cls(chosen[:, union], gate, up, down, part.act_fn, prompt)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the part makes of ``x`` (batch, n, dim) where all other activations are 0."""
        activations = self.activation(linear(x, *self.gate)) * linear(x, *self.up)
        return linear(activations.masked_fill(~self.chosen[:, None], 0.0), *self.down)

    def rows(self, index: torch.Tensor) -> Neurons:
        """As a reordered batch has it."""
        return replace(self, chosen=self.chosen.index_select(0, index.to(self.chosen.device)))

    def cropped(self, left: int) -> Neurons | None:
        """When only the first ``left`` tokens are left: the same, but none where the prompt is not whole any more."""
        return self if left >= self.prompt else None


class StepNeurons:
    """Stands in for the feed-forward parts of a model: a prompt computes all neurons, a step those that a method has chosen.

    What is chosen belongs to the cache: it follows its beams, outlives a crop of the answer, and is forgotten with the prompt.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.request: Request | None = None
        self._parts = [gated_part(layer, model) for layer in decoder_layers(model)]
        self._hook = model.register_forward_hook(lambda *_: self.stop(), always_call=True)
        for number, part in enumerate(self._parts):
            join(part, "forward", self, functools.partial(_narrowed, number=number, part=part))

    def remove(self) -> None:
        """Gives the parts their own forward back."""
        self._hook.remove()
        for part in self._parts:
            leave(part, "forward", self)

    def start(self, request: Request) -> None:
        """Serves the forward that begins now."""
        self.request = request

    def stop(self) -> None:
        """The forward is over, or has failed."""
        self.request = None


def _narrowed(original: Callable, steps: list[StepNeurons], number: int, part: torch.nn.Module) -> Callable:
    """Stands for the forward of layer ``number``'s feed-forward part."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        request = next((step.request for step in steps if step.request is not None), None)
        if request is None or request.positions is None:
            return original(x)
        layer = request.layers[number]
        memory = layer.memory
        if not request.reads and GATHERED in memory:
            return memory[GATHERED](x)
        made = original(x)
        if CHOSEN in memory:
            memory[GATHERED] = Neurons.of(part, memory.pop(CHOSEN), layer.seen)
        return made

    return forward


def gated_part(layer: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
    """The gated feed-forward part of a decoder layer; a LaconicError where it is of another kind."""
    part = find_part(layer, "mlp", model)
    projections = [getattr(part, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not (all(isinstance(p, torch.nn.Linear) for p in projections) and hasattr(part, "act_fn")):
        raise LaconicError(f"{type(model).__name__} has no gated feed-forward parts of plain matrices: leave neurons at 1.")
    return part


def _some(bias: torch.Tensor | None, index: torch.Tensor | slice) -> torch.Tensor | None:
    return None if bias is None else bias.detach()[index]
