"""Patches that leave the vision encoder between its blocks: later blocks neither compute nor see them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from laconic.primitives.merge import Merge
from laconic.vision.encoder import Trace, Want, find_blocks
from laconic.vision.sheets import Sheet

LEFT = Want("flow", -1)  # what a thinned encoder says of its patches: their running worth, those that left behind all others
INTO = Want("into", -1)  # what a merging one says of its patches: number of the cell that took in theirs, counted row by row


@dataclass(frozen=True)
class Flow:
    """What one call of a block's attention says of the patches that it sees, float32 ``(pictures, n)`` each, 0 for padding.

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

    ``sheet``: how the blocks hold the patches, and which are still there. ``last``: the block whose output are the features: it
    runs on what stays in the end. ``target(cells)``: how many of a picture's cells stay. A subclass writes ``change``.
    """

    even: ClassVar[bool] = False  # whether all pictures always have equally many, so that scores can be taken of what is there

    def __init__(
        self, tower: torch.nn.Module, method: Any, trace: Trace, sheet: Sheet, last: int, target: Callable[[int], int]
    ) -> None:
        self.method, self.trace, self.sheet, self.last, self.target = method, trace, sheet, last, target
        self.measured = [number for number in whole_blocks(tower) if number < last]
        self._full: torch.Tensor | None = None
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

    def tell(self) -> None:
        """The encoder is through: leaves in the trace what blocks were asked for, as figures of all patches."""
        self.trace.found = {want: self.sheet.joined(pieces) for want, pieces in self.trace.found.items()}

    def change(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        """What the block ``number`` hands on of ``hidden``, the states of all tokens, those that left among them; tells the sheet
        which patches go on. Not called after the last block."""
        raise NotImplementedError

    def see(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor | None:
        """Looks at a block's queries, keys and values ``(pictures, heads, n, d)``, and gives the ``mask`` of its attention
        without what only fills up short rows."""
        there = self.sheet.there(query)
        if bool(there.all()):
            return mask
        there = there[:, None, None]
        return there if mask is None else mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, float("-inf"))

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Figures of the patches that one call of a block's attention saw, as the trace keeps them."""
        return self.sheet.spread(values)

    def _before(
        self, number: int, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        self._full, self._number = args[0] if args else kwargs["hidden_states"], number
        self.sheet.begin(self._full)
        return self.sheet.take(self._full, args, kwargs)

    def _after(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        hidden = self.sheet.put_back(self._full, output[0] if isinstance(output, tuple) else output)
        if self._number < self.last:
            hidden = self.change(hidden, self._number)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def whole_blocks(tower: torch.nn.Module) -> list[int]:
    """The encoder's blocks whose patches see all of their picture, not only a window of it."""
    return list(getattr(tower, "fullatt_block_indexes", range(len(find_blocks(tower)))))


class Thinning(Shortening):
    """Patches leave step by step, by what a method makes of the flow through every block that sees whole pictures."""

    method: Thinner

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.worth: torch.Tensor | None = None  # float (pictures, patches), of the patches' whole cells
        self._flows: list[Flow] = []  # of the running block, one for each call of its attention

    def tell(self) -> None:
        """Leaves in the trace what the patches were worth, too."""
        super().tell()
        alive = self.sheet.alive
        self.trace.found[LEFT] = [self.sheet.flat(self.worth.masked_fill(~alive, 0.0) + self.worth.amax() * alive)]

    def see(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor | None:
        if self._number in self.measured:  # nothing leaves elsewhere
            self._flows.append(self._measure(query, key, value, scale, self.sheet.there(query)))
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
        if number not in self.measured:
            return hidden
        sheet, alive = self.sheet, self.sheet.alive.clone()
        worth = sheet.gathered([self.method.patch_worth(flow) for flow in self._flows])
        attention = sheet.gathered([flow.attention for flow in self._flows])
        self._flows = []
        worth = torch.stack([sheet.of_cells(i, sheet.cell_sums(i, part)) for i, part in enumerate(worth)])
        self.worth = worth if self.worth is None else torch.where(alive, self.method.running(self.worth, worth), self.worth)
        blocks, there, gone = sum(number < other for other in self.measured), [], []
        for picture, cells in enumerate(sheet.cells):
            here = alive[picture, cells[:, 0]].nonzero()[:, 0]
            seen = sheet.cell_sums(picture, attention[picture])[here]
            there.append(here)
            gone.append(self.method.leaving(len(here), self.target(len(cells)), blocks, seen))
        gone = [max(gone)] * len(gone) if self.method.together else gone
        for picture, (cells, here) in enumerate(zip(sheet.cells, there, strict=True)):
            count = min(gone[picture], len(here) - self.target(len(cells)))
            if count > 0:
                order = sheet.cell_sums(picture, self.worth[picture])[here].argsort(descending=True, stable=True)
                alive[picture, cells[here[order[len(here) - count :]]]] = False
        sheet.keep(alive)
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
        patches, alive = self.sheet.patches(hidden).clone(), self.sheet.alive.clone()
        found = torch.zeros(alive.shape, dtype=torch.int64, device=alive.device)
        for picture, cells in enumerate(self.sheet.cells):
            states = patches[picture, cells]  # (cells, patches of one, dim)
            into = self._windows(states.mean(1), self.sheet.grids[picture])
            merge, flat = Merge(into), states.flatten(1)
            merged = flat.index_copy(0, merge.kept, merge.mean(flat).to(flat.dtype))
            patches[picture, cells] = merged.view_as(states)
            alive[picture] &= self.sheet.of_cells(picture, into == torch.arange(len(into), device=into.device))
            found[picture] = self.sheet.of_cells(picture, into)
        self.trace.found[INTO] = [self.sheet.flat(found)]
        hidden = self.sheet.with_patches(hidden, patches)
        self.sheet.keep(alive)
        return hidden

    def _windows(self, states: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        target, side = self.target(len(states)), self.method.window
        into = merge_windows(states, shape, target, side)
        while int((into == torch.arange(len(into), device=into.device)).sum()) > target:
            side *= 2
            into = merge_windows(states, shape, target, side)
        return into


def merge_windows(states: torch.Tensor, shape: tuple[int, int], target: int, side: int) -> torch.Tensor:
    """Which cell takes in each of a picture's, int64 ``(cells,)``: the most alike windows of ``side`` x ``side`` merge until
    ``target`` cells are left, or all have merged.

    Args:
        states: ``(cells, dim)``, row by row. Windows at the lower and right edge may be smaller.
        shape: rows and columns.
    """
    (height, width), own = shape, torch.arange(len(states), device=states.device)
    across = -(-width // side)
    window = own // width // side * across + own % width // side
    order = window.argsort(stable=True)  # cells window by window
    sizes = torch.bincount(window, minlength=-(-height // side) * across)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order).index_copy(0, order, own - starts[window[order]])
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    sums = torch.zeros(len(sizes), states.shape[-1], device=states.device).index_add_(0, window, unit)
    alike = (sums.square().sum(-1) - sizes) / (sizes * (sizes - 1)).clamp(min=1)
    best = alike.masked_fill(sizes == 1, float("-inf")).argsort(descending=True, stable=True)
    saved = (sizes - 1)[best]
    needed = len(states) - target - (saved.cumsum(0) - saved)
    taken = torch.empty_like(best).scatter(0, best, needed.clamp(min=0).minimum(saved) + 1)  # cells of each window that merge
    taker = order[starts + taken // 2]
    return torch.where(rank < taken[window], taker[window], own)
