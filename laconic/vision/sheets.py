"""How the blocks of a vision encoder hold the patches of pictures, of which some have left."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch

from laconic.layers import take_rows


class Sheet(abc.ABC):
    """The patches of all pictures that an encoder sees at once. Patches leave as whole cells; a cell becomes one token.

    Attributes:
        cells: per picture int64 ``(c, m)``: the numbers of the patches of its cells, cells row by row.
        grids: per picture, rows and columns of its cells.
        alive: boolean ``(pictures, patches)``: which patches are still there; never those that only fill up a short row.
    """

    cells: list[torch.Tensor]
    grids: list[tuple[int, int]]
    alive: torch.Tensor | None = None

    @abc.abstractmethod
    def begin(self, hidden: torch.Tensor) -> None:
        """Learns how many patches there are from what the first block is given."""

    @abc.abstractmethod
    def keep(self, alive: torch.Tensor) -> None:
        """Only these patches go on to later blocks."""

    @abc.abstractmethod
    def take(self, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A block's arguments without the rows of what has left; None where nothing has."""

    @abc.abstractmethod
    def put_back(self, full: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
        """A block's output with what has left in the state of ``full``, which the block was given at first."""

    @abc.abstractmethod
    def there(self, query: torch.Tensor) -> torch.Tensor:
        """Which rows of a block's queries ``(batch, heads, n, d)`` are tokens, not padding: boolean ``(batch, n)``."""

    @abc.abstractmethod
    def patches(self, hidden: torch.Tensor) -> torch.Tensor:
        """The states of all patches, ``(pictures, patches, dim)``."""

    @abc.abstractmethod
    def with_patches(self, hidden: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """What ``patches`` was given, with other states."""

    @abc.abstractmethod
    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Figures of the patches that one call of a block's attention saw, in the form in which ``joined`` takes them."""

    @abc.abstractmethod
    def joined(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        """Figures of all calls of one block's attention, each ``spread``, as figures of all patches; 0 for what had left."""

    @abc.abstractmethod
    def gathered(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """As ``joined``, of figures that are not spread yet: ``(pictures, patches)``."""

    @abc.abstractmethod
    def flat(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``(pictures, patches)`` as the encoder itself holds patches."""

    def cell_sums(self, picture: int, values: torch.Tensor) -> torch.Tensor:
        """Sums over the patches of each cell of a picture, ``(cells,)``, of ``values`` (patches,)."""
        return values[self.cells[picture]].sum(-1)

    def of_cells(self, picture: int, values: torch.Tensor) -> torch.Tensor:
        """Values of a picture's cells as values of their patches, ``(patches,)``; 0 for padding."""
        cells = self.cells[picture]
        whole = values.new_zeros(self.alive.shape[1])
        whole[cells] = values[:, None].expand_as(cells)
        return whole


class Stack(Sheet):
    """Encoders that see every picture as one row of a batch, all of them squares of equally many patches.

    ``side``: patches along one side of a cell; ``first``: tokens in front of the patches, such as the class token.
    """

    def __init__(self, side: int, first: int) -> None:
        self.side, self.first = side, first
        self._order: torch.Tensor | None = None  # rows of the tokens that are still there, int64 (pictures, n), -1 behind

    def begin(self, hidden: torch.Tensor) -> None:
        if self.alive is not None:
            return
        pictures, count = len(hidden), hidden.shape[1] - self.first
        self.alive = torch.ones(pictures, count, dtype=torch.bool, device=hidden.device)
        across = round(count**0.5) // self.side
        square = torch.arange(count, device=hidden.device).view(across, self.side, across, self.side).transpose(1, 2)
        self.cells, self.grids = [square.reshape(across**2, -1)] * pictures, [(across, across)] * pictures

    def keep(self, alive: torch.Tensor) -> None:
        self.alive = alive
        if bool(alive.all()):
            return
        tokens = torch.nn.functional.pad(alive, (self.first, 0), value=True)
        order = (~tokens).to(torch.int8).argsort(dim=-1, stable=True)[:, : int(tokens.sum(-1).max())]
        self._order = order.masked_fill(~tokens.gather(1, order), -1)

    def take(self, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
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

    def put_back(self, full: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
        if self._order is None:
            return short
        row, at = (self._order >= 0).nonzero(as_tuple=True)
        whole = full.clone()
        whole[row, self._order[row, at]] = short[row, at]
        return whole

    def there(self, query: torch.Tensor) -> torch.Tensor:
        if self._order is None:
            return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        return self._order >= 0

    def patches(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, self.first :]

    def with_patches(self, hidden: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden[:, : self.first], patches], dim=1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        if self._order is None:
            return values
        order = self._order[:, self.first :]
        row, at = (order >= 0).nonzero(as_tuple=True)
        whole = values.new_zeros(self.alive.shape)
        whole[row, order[row, at] - self.first] = values[row, at]
        return whole

    def joined(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        return pieces

    def gathered(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        return self.spread(pieces[0])

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Packed(Sheet):
    """Encoders that see one row of the patches of all pictures, each in its own size, the patches of a cell side by side.

    Attention is called once for every stretch of the row whose patches see each other: a picture (a frame of a video), or a
    window of one. ``grids``: of all frames; ``orders``: per frame int64 ``(cells,)``, the place of each of its cells, row by row,
    among those of the frame; ``unit``: patches of a cell.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], orders: Sequence[torch.Tensor], unit: int) -> None:
        self.grids = list(grids)
        self.cells = [order[:, None] * unit + torch.arange(unit, device=order.device) for order in orders]
        self._rows: torch.Tensor | None = None  # of the patches that are still there, int64 (n,)

    def begin(self, hidden: torch.Tensor) -> None:
        if self.alive is None:
            self.cells = [cells.to(hidden.device) for cells in self.cells]
            counts = torch.tensor([cells.numel() for cells in self.cells], device=hidden.device)
            self._real = torch.arange(int(counts.max()), device=hidden.device) < counts[:, None]
            self.alive = self._real

    def keep(self, alive: torch.Tensor) -> None:
        self.alive = alive
        if not bool((alive == self._real).all()):
            self._rows = self.flat(alive)[0].nonzero()[:, 0]

    def take(self, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self._rows is None:
            return None
        rows, borders = self._rows, kwargs["cu_seqlens"]
        sizes = torch.searchsorted(rows, borders.long()).diff()
        borders = torch.nn.functional.pad(sizes[sizes > 0].cumsum(0), (1, 0)).to(borders.dtype)
        places = tuple(part[rows] for part in kwargs["position_embeddings"])
        kwargs = {**kwargs, "cu_seqlens": borders, "position_embeddings": places}
        return ((hidden[rows], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden[rows]})

    def put_back(self, full: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
        return short if self._rows is None else full.index_copy(0, self._rows, short)

    def there(self, query: torch.Tensor) -> torch.Tensor:
        return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)

    def patches(self, hidden: torch.Tensor) -> torch.Tensor:
        whole = hidden.new_zeros(*self._real.shape, hidden.shape[-1])
        whole[self._real] = hidden
        return whole

    def with_patches(self, hidden: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return patches[self._real]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def joined(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        row = torch.cat(pieces, dim=1)
        if row.shape[1] == int(self._real.sum()):
            return [row]
        return [row.new_zeros(1, int(self._real.sum())).index_copy(1, self._rows, row)]

    def gathered(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        (row,) = self.joined(pieces)
        whole = row.new_zeros(self._real.shape)
        whole[self._real] = row[0]
        return whole

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        return values[self._real][None]
