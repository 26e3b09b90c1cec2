"""Patches that leave the vision encoder between its blocks: later blocks neither compute nor see them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from laconic.layers import take_rows
from laconic.primitives.merge import Merge
from laconic.vision.encoder import Trace, Want, find_blocks

LEFT = Want("flow", -1)  # what a thinned encoder says of its patches: their running worth, those that left behind all others
INTO = Want("into", -1)  # what a merging one says of its cells, int64 (pictures, cells): the one that took each in, or itself


@dataclass(frozen=True)
class Flow:
    """What one block's attention says of the patches that are still there, float32 ``(pictures, patches)`` each, 0 for padding.

    ``attention``: from the class token, or the mean query without one: a softmax over all tokens, mean over heads. ``likeness``:
    the same of the class token's value (or the mean value) and the values. ``strength``: sum of the absolute values of the value
    vector that is the mean over heads.
    """

    attention: torch.Tensor
    likeness: torch.Tensor
    strength: torch.Tensor


class Thinner(Protocol):
    """What ``Thinning`` asks of a method."""

    def patch_worth(self, flow: Flow) -> torch.Tensor:
        """Worth of the patches in one block, as the flow is."""

    def running(self, before: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
        """Running worth of some patches after a further block."""

    together: bool  # whether all pictures that the encoder sees at once lose as many as the one that loses most

    def leaving(self, left: int, target: int, blocks: int, attention: torch.Tensor) -> int:
        """How many of ``left`` cells leave a picture of which ``target`` are to stay, ``blocks`` before the last drop."""


class Shortening:
    """Hooks on the encoder's blocks while it runs. What left keeps the state that it had, so the encoder's output has all rows.

    ``side``: patches along one side of a token's cell; cells leave whole. ``last``: the block whose output are the features: it
    runs on what stays in the end. ``target(cells)``: how many of a picture's cells stay. A subclass writes ``change``.
    """

    even: ClassVar[bool] = False  # whether all pictures always have equally many, so that scores can be taken of what is there

    def __init__(
        self, tower: torch.nn.Module, method: Any, trace: Trace, side: int, last: int, target: Callable[[int], int]
    ) -> None:
        self.method, self.trace, self.side, self.last, self.target = method, trace, side, last, target
        self.alive: torch.Tensor | None = None  # boolean (pictures, patches)
        self._full: torch.Tensor | None = None
        self._order: torch.Tensor | None = None
        self._number = 0  # of the running block
        self._hooks: list[Any] = []
        self._modules: list[torch.nn.Module] = []
        for number, block in enumerate(find_blocks(tower)):
            self._hooks.append(block.register_forward_pre_hook(functools.partial(self._before, number), with_kwargs=True))
            self._hooks.append(block.register_forward_hook(self._after, prepend=True))  # ahead of what records hidden states
            for module in block.modules():
                module.__dict__["_laconic_thinning"] = self
                self._modules.append(module)

    def stop(self) -> None:
        """Takes the hooks out of the encoder."""
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            module.__dict__.pop("_laconic_thinning", None)

    def change(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        """What the block ``number`` hands on of ``hidden`` (pictures, n, dim), the states of all tokens, those that left among
        them; says by ``alive`` which patches go on. Not called after the last block."""
        raise NotImplementedError

    def see(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor | None:
        """Looks at a block's queries, keys and values ``(pictures, heads, n, d)``, and gives the ``mask`` of its attention
        without what only fills up short rows."""
        there = self._there(query)
        if bool(there.all()):
            return mask
        there = there[:, None, None]
        return there if mask is None else mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, float("-inf"))

    def _there(self, query: torch.Tensor) -> torch.Tensor:
        """Which rows of the block's input are tokens, not padding: boolean ``(pictures, n)``."""
        if self._order is None:
            return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        return self._order >= 0

    def _before(
        self, number: int, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._full, self._number = hidden, number
        if self.alive is None:
            self.alive = torch.ones(len(hidden), hidden.shape[1] - int(self.trace.has_class), dtype=torch.bool)
            self.alive = self.alive.to(hidden.device)
        if self._order is None:
            return None
        index = self._order.clamp(min=0)
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        short = take_rows(hidden, index, *hidden.shape[:2])
        if mask is None:
            return ((short, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": short})
        mask = mask.expand(len(hidden), -1, -1, -1).gather(3, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return (short,), {**{k: v for k, v in kwargs.items() if k != "hidden_states"}, "attention_mask": mask}

    def _after(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if self._order is not None:
            row, at = (self._order >= 0).nonzero(as_tuple=True)
            whole = self._full.clone()
            whole[row, self._order[row, at]] = hidden[row, at]
            hidden = whole
        if self._number < self.last:
            hidden = self.change(hidden, self._number)
            if not bool(self.alive.all()):
                self._order = self._rows()
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _rows(self) -> torch.Tensor:
        """Rows of the tokens that are still there, padded with -1 behind: int64 ``(pictures, n)``."""
        first = int(self.trace.has_class)
        tokens = torch.nn.functional.pad(self.alive, (first, 0), value=True)
        order = (~tokens).to(torch.int8).argsort(dim=-1, stable=True)[:, : int(tokens.sum(-1).max())]
        return order.masked_fill(~tokens.gather(1, order), -1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the patches that a block saw as values of all patches, 0 for those that left."""
        if self._order is None:
            return values
        first = int(self.trace.has_class)
        there = self._order[:, first:] >= 0
        row, at = there.nonzero(as_tuple=True)
        whole = values.new_zeros(self.alive.shape)
        whole[row, self._order[:, first:][row, at] - first] = values[row, at]
        return whole

    def _cells(self, patches: torch.Tensor) -> torch.Tensor:
        """The sum over the patches of each cell, ``(pictures, cells)``."""
        if self.side == 1:
            return patches
        side = round(patches.shape[1] ** 0.5)
        return patches.view(len(patches), side // self.side, self.side, side // self.side, self.side).sum((2, 4)).flatten(1)

    def _on_grid(self, cells: torch.Tensor) -> torch.Tensor:
        """Values of the cells as values of all of their patches."""
        if self.side == 1:
            return cells
        side = round(cells.shape[1] ** 0.5)
        grid = cells.view(len(cells), side, 1, side, 1).expand(-1, -1, self.side, -1, self.side)
        return grid.reshape(len(cells), -1)


class Thinning(Shortening):
    """Patches leave step by step, by what a method makes of the flow through every block."""

    method: Thinner

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.worth: torch.Tensor | None = None  # float (pictures, patches), of the patches or of their whole cells
        self._flow: Flow | None = None

    def stop(self) -> None:
        """Leaves in the trace what the patches were worth, too."""
        super().stop()
        if self.worth is not None:
            self.trace.found[LEFT] = [self.worth.masked_fill(~self.alive, 0.0) + self.worth.amax() * self.alive]

    def see(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor | None:
        if self._number < self.last:  # nothing leaves later
            self._flow = self._measure(query, key, value, scale, self._there(query))
        return super().see(query, key, value, mask, scale)

    def _measure(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, there: torch.Tensor) -> Flow:
        first = int(self.trace.has_class)
        count = there.sum(-1)[:, None, None, None]
        rows = [t.float() if first else t.float().masked_fill(~there[:, None, :, None], 0.0) for t in (query, value)]
        asks, means = (t[:, :, :1] if first else t.sum(2, keepdim=True) / count for t in rows)
        seen = [(asks @ key.float().mT) * scale, means @ value.float().mT]
        shares = [s[:, :, 0].masked_fill(~there[:, None], float("-inf")).softmax(-1).mean(1)[:, first:] for s in seen]
        strength = value.float().mean(1).abs().sum(-1)[:, first:].masked_fill(~there[:, first:], 0.0)
        return Flow(*shares, strength)

    def change(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        worth = self._on_grid(self._cells(self.spread(self.method.patch_worth(self._flow))))
        self.worth = worth if self.worth is None else torch.where(self.alive, self.method.running(self.worth, worth), self.worth)
        attention = self._cells(self.spread(self._flow.attention))
        alive, score = self._cells(self.alive.float()) > 0, self._cells(self.worth)
        target, blocks = self.target(alive.shape[1]), self.last - 1 - number
        there = [row.nonzero()[:, 0] for row in alive]
        gone = [self.method.leaving(len(here), target, blocks, seen[here]) for here, seen in zip(there, attention, strict=True)]
        gone = [max(gone)] * len(gone) if self.method.together else gone
        for picture, here in enumerate(there):
            count = min(gone[picture], len(here) - target)
            if count > 0:
                order = score[picture, here].argsort(descending=True, stable=True)
                alive[picture, here[order[len(here) - count :]]] = False
        self.alive = self._on_grid(alive)
        return hidden


class Merging(Shortening):
    """Windows of cells whose states are alike become one cell each, after the first block, until the target is met.

    A window is as alike as the mean cosine of its cells with each other. It becomes the mean of its cells, in the place of the
    one in the middle; patches of a cell keep apart. The last window may merge in part, so that the count is exact. Where all
    windows together leave too many, larger ones are taken.
    """

    even = True

    def change(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        if number > 0:
            return hidden
        first = int(self.trace.has_class)
        cells = self._states(hidden[:, first:])  # (pictures, cells, side * side, dim)
        target, side = self.target(cells.shape[1]), self.method.window
        into = merge_windows(cells.mean(2), target, side)
        while int((into[0] == torch.arange(into.shape[1], device=into.device)).sum()) > target:
            side *= 2
            into = merge_windows(cells.mean(2), target, side)
        self.trace.found[INTO] = [into]
        own = torch.arange(into.shape[1], device=into.device)
        merge = Merge((into + torch.arange(len(into), device=into.device)[:, None] * into.shape[1]).flatten())
        flat = cells.flatten(0, 1).flatten(1)
        merged = flat.index_copy(0, merge.kept, merge.mean(flat).to(flat.dtype)).view_as(cells)
        self.alive = self._on_grid(into == own)
        return torch.cat([hidden[:, :first], self._patches(merged)], dim=1)

    def _states(self, patches: torch.Tensor) -> torch.Tensor:
        """States ``(pictures, patches, dim)`` as those of the cells, ``(pictures, cells, side * side, dim)``."""
        side = round(patches.shape[1] ** 0.5) // self.side
        blocks = patches.unflatten(1, (side, self.side, side, self.side)).transpose(2, 3)
        return blocks.flatten(3, 4).flatten(1, 2)

    def _patches(self, cells: torch.Tensor) -> torch.Tensor:
        """What ``_states`` was given."""
        side = round(cells.shape[1] ** 0.5)
        return cells.unflatten(1, (side, side)).unflatten(3, (self.side, self.side)).transpose(2, 3).flatten(1, 4)


def merge_windows(states: torch.Tensor, target: int, side: int) -> torch.Tensor:
    """Which cell takes in each of a square grid's, int64 ``(pictures, cells)``: the most alike windows of ``side`` x ``side``
    merge until ``target`` cells are left, or all have merged.

    Args:
        states: ``(pictures, cells, dim)``. Windows at the lower and right edge may be smaller.
    """
    pictures, count, _ = states.shape
    grid = round(count**0.5)
    row, column = (torch.arange(count, device=states.device).div(d, rounding_mode="floor") % grid for d in (grid, 1))
    across = -(-grid // side)
    window = row // side * across + column // side
    order = window.argsort(stable=True)  # cells window by window
    sizes = torch.bincount(window, minlength=across**2)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(count, device=order.device) - starts[window[order]])
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    sums = torch.zeros(pictures, across**2, states.shape[-1], device=states.device).index_add_(1, window, unit)
    alike = (sums.square().sum(-1) - sizes) / (sizes * (sizes - 1)).clamp(min=1)
    best = alike.masked_fill(sizes == 1, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    saved = (sizes - 1)[best]
    needed = count - target - (saved.cumsum(-1) - saved)
    taken = torch.empty_like(best).scatter(1, best, needed.clamp(min=0).minimum(saved) + 1)  # cells of each window that merge
    taker = order[(starts + taken // 2)]
    return torch.where(rank < taken[:, window], taker[:, window], torch.arange(count, device=order.device))
