"""Memory that grows: entries of all heads side by side, or of each head in its own length."""

from __future__ import annotations

import torch

from laconic import kernels
from laconic.kernels.memory import empty
from laconic.kernels.ragged import SPARE, Places, Ragged

LATE = 64  # appends that may wait for a reader


class Buffer:
    """A tensor ``(batch, heads, n, ...)`` that grows along n: memory doubles, appending is amortised O(new), reads are views."""

    def __init__(self, first: torch.Tensor, reserve: int = 0) -> None:
        self.n, self._begin = 0, 0
        self._view: torch.Tensor | None = None  # made once per change: a step reads it a dozen times
        self._late: list[torch.Tensor] = []
        count = first.shape[2]
        capacity = max(reserve, count + max(64, count // 8))  # room for an answer, before the first doubling
        self._data = empty((*first.shape[:2], capacity, *first.shape[3:]), first.dtype, first.device)
        self.append(first)

    def append(self, new: torch.Tensor) -> None:
        if self._late:
            self._catch_up()
        begin, count = self._begin + self.n, new.shape[2]
        if begin + count > self._data.shape[2]:
            end = self.n + count
            # what has forgotten its front moves there and stays at its size; what has not is growing
            self._reallocate(end + max(64, end // 8) if self._begin else max(end, 2 * self.capacity))
            begin = self._begin + self.n
        self._data.narrow(2, begin, count).copy_(new)
        self.n, self._view = self.n + count, None

    def append_late(self, new: torch.Tensor) -> None:
        """Appends ``new`` (batch, count), the same for all heads, as soon as somebody looks: a step may go by without."""
        self._late.append(new)
        self.n, self._view = self.n + new.shape[1], None
        if len(self._late) == LATE:
            self._catch_up()

    def _catch_up(self) -> None:
        new = torch.cat(self._late, dim=1)
        self._late = []
        self.n -= new.shape[1]
        self.append(new.unsqueeze(1))

    def view(self) -> torch.Tensor:
        if self._view is None:
            if self._late:
                self._catch_up()
            self._view = self._data.narrow(2, self._begin, self.n)
        return self._view

    def keep(self, slots: torch.Tensor) -> None:
        """Keeps ``slots`` (batch, heads or 1, k) in that order and gives the memory of the others back."""
        count = slots.shape[2]
        if 2 * count < self.capacity or slots.shape[1] > self._data.shape[1]:
            self._data, self._begin = take(self.view(), slots), 0
        else:  # nearly the same size, as in every decode step at a fixed budget: stay in place
            kernels.compact(self.view(), slots)
        self.n, self._view = count, None

    def drop_front(self, count: int) -> None:
        """Forgets the first ``count`` entries of every row and head; their memory is given back when it is a good part."""
        if self._late:
            self._catch_up()
        self._begin, self.n, self._view = self._begin + count, self.n - count, None
        if 2 * self._begin > self.capacity:
            self._reallocate(self.n + max(64, self.n // 8))

    def shift(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies the entries at slots ``source`` (batch, heads, k) to slots ``target`` of the same row and head."""
        view = self.view()
        index = target if view.dim() == 3 else target[..., None].expand(*target.shape, view.shape[-1])
        view.scatter_(2, index, take(view, source))

    def crop(self, n: int) -> None:
        while self._late and self.n > n:  # what nobody has looked at is not written to be cut off
            last = self._late.pop()
            self.n -= last.shape[1]
            if self.n < n:
                self._late.append(last[:, : n - self.n])
                self.n = n
        self.n, self._view = n, None

    def rows(self, index: torch.Tensor) -> None:
        """Picks rows of the batch (beams); keeps the capacity."""
        picked = self.view().index_select(0, index.to(self._data.device))
        data = empty((picked.shape[0], *self._data.shape[1:]), picked.dtype, picked.device)
        data[:, :, : self.n] = picked
        self._data, self._begin, self._view = data, 0, None

    def copy(self) -> Buffer:
        twin = object.__new__(Buffer)
        twin.n, twin._begin, twin._data, twin._view, twin._late = self.n, 0, self.view().clone(), None, []
        return twin

    @property
    def capacity(self) -> int:
        return self._data.shape[2]

    @property
    def bytes(self) -> int:
        """Of the entries held."""
        return self.view().nbytes

    def _reallocate(self, capacity: int) -> None:
        data = empty((*self._data.shape[:2], capacity, *self._data.shape[3:]), self._data.dtype, self._data.device)
        data[:, :, : self.n] = self.view()
        self._data, self._begin, self._view = data, 0, None


class RaggedBuffer:
    """As ``Buffer``, for entries ``(batch, heads, n, dim)`` of which each row and head stores only those from its first slot on.

    All of them stand in one piece of memory, each row and head with the same room to grow.

    Args:
        entries: ``(total, dim)``: what is stored, row by row and head by head.
        starts: int64 ``(batch, heads)``: the first slot that each stores; n: slots of the longest.
    """

    def __init__(self, entries: torch.Tensor, starts: torch.Tensor, n: int) -> None:
        self.n, self.starts = n, starts
        self._move(entries, room=64)

    def _move(self, entries: torch.Tensor, room: int) -> None:
        """Puts ``entries`` into memory of their own, with room for so many more slots."""
        places = Places.of(self.starts, self.n, room)
        self._first, self._room = places.bases + self.starts, self.n - self.starts + room
        self._data = empty((places.total, entries.shape[1]), entries.dtype, entries.device)
        self._data[:SPARE] = 0
        self._data[self._places()] = entries

    def _places(self) -> torch.Tensor:
        """Where in memory the entries stand, row by row and head by head."""
        slot = torch.arange(self.n, device=self._data.device)
        return ((self._first - self.starts)[..., None] + slot)[slot >= self.starts[..., None]]

    def append(self, new: torch.Tensor) -> None:
        count = new.shape[2]
        if bool((self.n - self.starts + count > self._room).any()):
            entries = self._data[self._places()]
            self._move(entries, room=max(count, len(entries) // (8 * self.starts.numel())) + 64)
        slot = torch.arange(self.n, self.n + count, device=new.device)
        self._data[(self._first - self.starts)[..., None] + slot] = new
        self.n += count

    def view(self) -> Ragged:
        return Ragged(self._data, self._first - self.starts, self.starts, self.n)

    def keep(self, slots: torch.Tensor) -> None:
        """Keeps ``slots`` (batch, heads, k), -1 in front where fewer, and gives the memory of the others back."""
        view, starts = self.view(), (slots < 0).sum(-1)
        count = int((slots >= 0).sum())
        if len(self._data) > 2 * count:
            entries = pick(view, slots)
            self.n, self.starts = slots.shape[2], starts
            self._move(entries, room=64)
        else:  # nearly the same size, as in every decode step at a fixed budget: stay in place
            self.n, self.starts = slots.shape[2], starts
            kernels.compact(view, slots, self._first - starts)

    def drop_front(self, count: int) -> None:
        """Forgets the first ``count`` slots of every row and head; their memory goes with the next move."""
        self.front(self.starts.clamp(min=count))
        self.n, self.starts = self.n - count, self.starts - count

    def shift(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies the entries at slots ``source`` (batch, heads, k) to slots ``target`` of the same row and head."""
        base = (self._first - self.starts)[..., None]
        self._data[base + target] = self._data[base + source]

    def front(self, starts: torch.Tensor) -> None:
        """Forgets the slots before ``starts`` (batch, heads); their memory goes with the next move."""
        self._room = self._room - (starts - self.starts)
        self._first, self.starts = self._first + starts - self.starts, starts

    def crop(self, n: int) -> None:
        starts = self.starts.clamp(max=n)
        self._first, self.n, self.starts = self._first + starts - self.starts, n, starts

    def rows(self, index: torch.Tensor) -> None:
        """Picks rows of the batch (beams)."""
        view, index = self.view(), index.to(self._data.device)
        picked = Ragged(view.data, view.bases[index], view.starts[index], view.n)
        slot = torch.arange(self.n, device=index.device).expand(*picked.shape[:3])
        self.starts = picked.starts
        self._move(pick(picked, torch.where(slot >= picked.starts[..., None], slot, -1)), room=64)

    @property
    def bytes(self) -> int:
        """Of the entries held."""
        return self.view().numel() * self._data.element_size()

    def copy(self) -> RaggedBuffer:
        return RaggedBuffer(self._data[self._places()], self.starts.clone(), self.n)


def kept(buffer: Buffer | RaggedBuffer, slots: torch.Tensor, ragged: bool) -> Buffer | RaggedBuffer:
    """``buffer`` with the entries ``slots`` (batch, heads or 1, k) only; each head in its own length if ``ragged``."""
    view = buffer.view()
    if ragged and len(view.shape) == 4:
        slots = slots.expand(-1, view.shape[1], -1)
        if not isinstance(buffer, RaggedBuffer):
            return RaggedBuffer(pick(view, slots), (slots < 0).sum(-1), slots.shape[2])
    elif isinstance(buffer, RaggedBuffer):
        return Buffer(take(view, slots))
    buffer.keep(slots)
    return buffer


def pick(tensor: torch.Tensor | Ragged, slots: torch.Tensor) -> torch.Tensor:
    """The entries at those of ``slots`` (batch, heads, k) that are not -1, row by row and head by head: ``(total, dim)``."""
    real = slots >= 0
    if isinstance(tensor, Ragged):
        return tensor.data[(tensor.bases[..., None] + slots)[real]]
    row, head, _ = real.nonzero(as_tuple=True)
    return tensor[row, head, slots[real]]


def take(tensor: torch.Tensor | Ragged, slots: torch.Tensor) -> torch.Tensor:
    """Gathers ``slots`` (batch, heads or 1, k) along dimension 2 of ``tensor`` (batch, heads or 1, n, ...)."""
    heads = max(tensor.shape[1], slots.shape[1])
    if isinstance(tensor, Ragged):
        return tensor.rows(slots.expand(-1, heads, -1))
    if slots.shape[:2] == (1, 1) and tensor.shape[0] == 1:  # the same for all: whole entries are copied
        return tensor.index_select(2, slots[0, 0].clamp(min=0))
    index = slots.clamp(min=0).expand(-1, heads, -1)
    tensor = tensor.expand(-1, heads, *tensor.shape[2:])
    if tensor.dim() > 3:
        index = index[..., None].expand(*index.shape, tensor.shape[-1])
    return tensor.gather(2, index)


def locate(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where in ``held`` (batch, heads or 1, n), ascending, each of ``wanted`` (batch, heads or 1, k) stands: int64
    ``(batch, heads, k)``, ascending; -1 in front for what is not held, and for a wanted -1."""
    return find(held, wanted).sort(dim=-1).values


def find(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """As ``locate``, each in the place of the wanted one."""
    heads = max(held.shape[1], wanted.shape[1])
    held, wanted = held.expand(-1, heads, -1).contiguous(), wanted.expand(-1, heads, -1).contiguous()
    found = torch.searchsorted(held, wanted).clamp(max=held.shape[-1] - 1)
    return found.masked_fill((wanted < 0) | (held.gather(2, found) != wanted), -1)
