"""What the parts of a language model's layers do to its tokens, for methods that go by that."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from laconic.cache import Request
from laconic.errors import LaconicError
from laconic.layers import decoder_layers


class Watcher(Protocol):
    """A method that looks at parts of layers: ``watches_parts`` names them, of ``attention``, ``mlp`` and ``neurons``."""

    watches_parts: tuple[str, ...]

    def watched(self, request: Request, layer: int, part: str, given: torch.Tensor, made: torch.Tensor) -> None:
        """Called after a part of a layer of a forward with pictures: what it was given and what it made of it, both
        ``(batch, rows, width)``, normed before and not yet added to the residual stream. Of ``neurons`` both are the activations
        that go into the last matrix of the feed-forward part."""


class LayerWatch:
    """Hooks on the parts of every decoder layer, which tell the ``methods`` what passes while a prompt with pictures runs."""

    def __init__(self, model: torch.nn.Module, methods: tuple[Watcher, ...]) -> None:
        self._request: Request | None = None
        self._hooks = [model.register_forward_hook(lambda *_: self.stop(), always_call=True)]
        for number, layer in enumerate(decoder_layers(model)):
            for name, module in (("attention", "self_attn"), ("mlp", "mlp"), ("neurons", "mlp.down_proj")):
                interested = [m for m in methods if name in m.watches_parts]
                if interested:
                    part = find_part(layer, module, model)
                    self._hooks.append(part.register_forward_hook(self._tell(number, name, interested), with_kwargs=True))

    def _tell(self, number: int, name: str, methods: list[Watcher]) -> Any:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if self._request is None or self._request.pictures is None:
                return
            given = args[0] if args else kwargs["hidden_states"]
            made = given if name == "neurons" else output[0] if isinstance(output, tuple) else output
            for method in methods:
                method.watched(self._request, number, name, given, made)

        return hook

    def remove(self) -> None:
        """Takes the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def start(self, request: Request) -> None:
        """Serves the forward that begins now."""
        self._request = request

    def stop(self) -> None:
        """The forward is over, or has failed."""
        self._request = None


def find_part(layer: torch.nn.Module, name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The part of a decoder layer with a dotted ``name``; a LaconicError where there is none."""
    for step in name.split("."):
        if not hasattr(layer, step):
            raise LaconicError(f"The layers of {type(model).__name__} have no {name}, which this method looks at.")
        layer = getattr(layer, step)
    return layer


def rows_at(request: Request) -> torch.Tensor:
    """Positions of the rows that the running layer computes, int64 ``(batch, rows)``, -1 for padding."""
    return request.living if request.living is not None else request.positions


def add_at(table: torch.Tensor | None, request: Request, values: torch.Tensor) -> torch.Tensor:
    """``table`` (batch, positions) with ``values`` (batch, rows) added where the running rows stand."""
    at = rows_at(request).to(values.device)
    if table is None:
        table = values.new_zeros(values.shape[0], request.pictures.shape[1])
    return table.scatter_add(1, at.clamp(min=0), values.masked_fill(at < 0, 0.0))
