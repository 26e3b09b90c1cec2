"""Tokens that leave a prompt on its way up: deeper layers compute fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from laconic.buffers import locate
from laconic.cache import Request
from laconic.errors import LaconicError
from laconic.primitives.merge import Merge


class LayerShrinker:
    """Hooks on the decoder layers of a model that run them on the living tokens only.

    While a forward with more than one token runs, a method says in any layer which tokens go on (``Request.onward``). For
    every deeper layer the rows of the others are taken out of all that it gets, and its cache receives the living tokens
    with their true positions. After the layer the rows are put back where they stood, so that whatever the model does
    between layers, and its output, have their usual length: the row of a dead token is its hidden state from where it died.
    Tokens that go on may take others in (``Request.into``): they become the mean of the hidden states of all, or the sum of
    their own and of the others' mean (``Request.adds``). Who took whom in is told afterwards (``Request.merged``).

    Rows of a batch may keep different numbers of tokens: the shorter ones are padded on the left, with position -1.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._request: Request | None = None
        self._onward: torch.Tensor | None = None  # what the rows were found from
        self._rows: torch.Tensor | None = None
        self._whole: torch.Tensor | None = None
        layers = decoder_layers(model)
        self._hooks = [model.register_forward_hook(lambda *_: self.stop(), always_call=True)]
        for layer in layers[1:]:  # the first one computes everything
            self._hooks.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(self._after))

    def remove(self) -> None:
        """Takes the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def start(self, request: Request) -> None:
        """Serves the forward that begins now, whose positions ``request`` knows; a single token is left alone."""
        self.stop()
        if request.reads:
            self._request = request
            request.merged = None

    def stop(self) -> None:
        """The forward is over, or has failed."""
        if self._request is not None:
            self._request.onward = self._request.living = self._request.into = self._request.adds = None
        self._request = self._onward = self._rows = self._whole = None

    def _before(self, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self._request is None or self._request.onward is None:
            return None
        if self._request.onward is not self._onward:
            self._onward = self._request.onward
            self._rows = self._find_rows()
            if self._request.into is not None:
                args, kwargs = self._take_in(args, kwargs)
        if self._rows is None:
            return args, kwargs
        self._whole = args[0] if args else kwargs["hidden_states"]
        batch, count = self._request.positions.shape
        return change_tensors((args, kwargs), lambda tensor: take_rows(tensor, self._rows, batch, count))

    def _after(self, layer: torch.nn.Module, args: tuple, output: Any) -> Any:
        if self._request is None or self._rows is None:
            return None
        if isinstance(output, tuple):
            return (self._put_back(output[0]), *output[1:])
        return self._put_back(output)

    def _find_rows(self) -> torch.Tensor | None:
        """Which rows of the forward go on, int64 ``(batch, k)`` ascending, -1 in front where fewer; None for all of them."""
        positions = self._request.positions
        rows = locate(positions[:, None], self._onward[:, None].to(positions.device))[:, 0]
        count = positions.shape[1]
        if bool(((rows[:, -1] != count - 1) & (positions[:, -1] >= 0)).any()):
            raise LaconicError("The last token of a prompt has to reach the last layer: let the method keep it.")
        if bool(((rows >= 0).sum(-1) == (positions >= 0).sum(-1)).all()):
            return None
        rows = rows[:, min(int((rows < 0).sum(-1).min()), rows.shape[1] - 1) :]
        self._request.living = positions.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        return rows

    def _take_in(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the layer is given, with hidden states in which tokens that take others in stand for them all."""
        request = self._request
        into, adds = request.into, request.adds
        request.into = request.adds = None
        request.merged = into if request.merged is None else torch.where(into >= 0, into, request.merged)
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        for row in (into >= 0).any(-1).nonzero()[:, 0].tolist():
            givers = (into[row] >= 0).nonzero()[:, 0]
            members = torch.cat([givers, into[row, givers]]).unique()  # positions of all that take part
            target = into[row, members]
            merge = Merge(torch.searchsorted(members, torch.where(target >= 0, target, members)).to(hidden.device))
            slots = torch.searchsorted(request.positions[row].to(members.device), members).to(hidden.device)
            made = merge.mean(hidden[row, slots])
            if adds is not None:
                sums = hidden[row, slots[merge.kept]] + merge.of_others(hidden[row, slots])[0]
                added = torch.isin(merge.kept, merge.into[adds[row, members].to(hidden.device)])
                made = torch.where(added[:, None], sums, made)
            hidden[row, slots[merge.kept]] = made.to(hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _put_back(self, rows: torch.Tensor) -> torch.Tensor:
        """The whole hidden states ``(batch, count, dim)`` with what the layer made of the living rows."""
        whole = self._whole.to(rows.device, copy=True)
        row, slot = (self._rows >= 0).to(rows.device).nonzero(as_tuple=True)
        whole[row, self._rows.to(rows.device)[row, slot]] = rows[row, slot]
        self._whole = None
        return whole


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of the text model in order; a LaconicError where there is no list of them."""
    count = model.config.get_text_config().num_hidden_layers

    def is_layer(module: torch.nn.Module, index: int) -> bool:
        return any(getattr(part, "layer_idx", None) == index for part in module.modules())

    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and all(map(is_layer, module, range(count))):
            return list(module)
    raise LaconicError(f"{type(model).__name__} has no list of decoder layers, so no token can leave it between two of them.")


def change_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with every tensor in its tuples, lists and dicts changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(change_tensors(item, change) for item in value)
    if type(value) is dict:
        return {name: change_tensors(item, change) for name, item in value.items()}
    return value


def take_rows(tensor: torch.Tensor, rows: torch.Tensor, batch: int, count: int) -> torch.Tensor:
    """Picks ``rows`` (batch, k) of a tensor that has one entry per token: ``count`` behind a dimension of ``batch`` or 1.

    Hidden states (batch, count, dim), cosines (1, count, dim), positions (1, count), and with several kinds of positions
    (3, batch, count). Other tensors are left as they are. How far tokens see (``laconic_reach``) goes with the mask.
    """
    for dim in range(1, tensor.dim()):
        if tensor.shape[dim] == count and tensor.shape[dim - 1] in (1, batch):
            index = rows.clamp(min=0).to(tensor.device)
            every = torch.arange(batch, device=tensor.device)[:, None]
            ahead = (slice(None),) * (dim - 1)
            shape = list(tensor.shape)
            shape[dim - 1] = batch
            taken = tensor.expand(shape)[(*ahead, every, index)]
            if hasattr(tensor, "laconic_reach"):
                taken.laconic_reach = tensor.laconic_reach.expand(batch, -1)
            return taken
    return tensor
