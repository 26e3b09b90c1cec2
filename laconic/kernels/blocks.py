"""One entry for each block of neighbouring keys, to score blocks before tokens."""

from __future__ import annotations

import torch

from laconic.errors import LaconicError
from laconic.kernels.memory import empty

KINDS = ("bounds", "mean")


class KeyBlocks:
    """What each block of ``size`` neighbouring keys has in common: its bounds, or its mean. Appending is amortised O(new).

    A row's blocks begin at its first real token, so that a padded row has the blocks of the row alone; keys of padding are
    in none of them. Rows with fewer blocks than others have empty ones at the end.

    Args:
        keys: ``(batch, kv_heads, n, head_dim)``.
        size: tokens per block.
        kind: ``bounds`` keeps the elementwise largest and smallest of a block's keys (in their dtype), ``mean`` their mean
            (float32).
        starts: int64 ``(batch, kv_heads)``: the first real slot of each row and head; None: slot 0.
        lead: int64 ``(batch, kv_heads)``: places of the first block before ``starts`` that stay empty, less than ``size``;
            None: none. A text that has lost its beginning keeps its block borders with it.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        size: int,
        *,
        kind: str = "bounds",
        starts: torch.Tensor | None = None,
        lead: torch.Tensor | None = None,
    ) -> None:
        if size < 1 or kind not in KINDS:
            raise LaconicError(f"Blocks of {size} keys by {kind} cannot be made: give a size of at least 1 and one of {KINDS}.")
        batch, heads, _, dim = keys.shape
        zeros = torch.zeros(batch, heads, dtype=torch.int64, device=keys.device)
        self.size, self.kind, self.n = size, kind, 0
        self.starts = zeros if starts is None else starts.expand(batch, heads)
        self.origins = self.starts - (zeros if lead is None else lead)  # the slot of the first place of block 0
        self._last = int(self.starts.amax())  # from here on, no row has padding
        self._lowest, self._highest = int(self.origins.amin()), int(self.origins.amax())
        width, dtype = (2 * dim, keys.dtype) if kind == "bounds" else (dim, torch.float32)
        self._data = torch.empty(batch, heads, 0, width, dtype=dtype, device=keys.device)
        self._first = keys.shape[2]  # slots that were there at the start
        self.append(keys)

    def append(self, keys: torch.Tensor) -> None:
        """Adds the keys of new tokens, ``(batch, kv_heads, new, head_dim)``."""
        new, done = keys.shape[2], 0
        self._reserve(max(1, (self.n + new - self._lowest + self.size - 1) // self.size))
        while done < new:
            inside = (self.n - self._lowest) % self.size
            aligned = self._lowest == self._highest and self.n >= self._last and inside == 0
            whole = (new - done) // self.size * self.size
            if aligned and whole:
                self._whole(keys[:, :, done : done + whole])
                count = whole
            elif self._lowest == self._highest:  # up to the next border, or past all padding
                count = min(new - done, max(self.size - inside, self._last - self.n))
                self._part(keys[:, :, done : done + count])
            else:
                count = new - done
                self._part(keys[:, :, done:])
            self.n += count
            done += count

    def _whole(self, keys: torch.Tensor) -> None:
        """Whole blocks that begin at the same slot in every row."""
        at, parts = (self.n - self._lowest) // self.size, keys.unflatten(2, (-1, self.size))
        target = self._data[:, :, at : at + parts.shape[2]]
        if self.kind == "mean":
            target.copy_(parts.float().mean(3))
        else:
            target[..., : keys.shape[3]] = parts.amax(3)
            target[..., keys.shape[3] :] = parts.amin(3)

    def _part(self, keys: torch.Tensor) -> None:
        """Keys that may belong to begun blocks, to different ones in different rows, or be padding."""
        new, dim = keys.shape[2:]
        slot = torch.arange(self.n, self.n + new, device=keys.device)
        real = slot >= self.starts[..., None]
        first = (self.n - self._highest) // self.size if self.n > self._highest else 0
        index = ((slot - self.origins[..., None]) // self.size).clamp(min=0) - first
        index = index.clamp(min=0)[..., None].expand(-1, -1, -1, dim)  # only padding lies before, and adds nothing
        last = max(first, (self.n + new - 1 - self._lowest) // self.size) + 1
        target = self._data[:, :, first:last]
        if self.kind == "mean":
            target *= self._tokens(self.n, first, last)
            target.scatter_add_(2, index, keys.float() * real[..., None])
            target /= self._tokens(self.n + new, first, last).clamp(min=1)
        else:
            for part, how, nothing in ((target[..., :dim], "amax", -torch.inf), (target[..., dim:], "amin", torch.inf)):
                part.scatter_reduce_(2, index, keys.masked_fill(~real[..., None], nothing), how)

    def _tokens(self, n: int, first: int, last: int) -> torch.Tensor:
        """Tokens in blocks first..last-1 when there are ``n`` slots, ``(batch, kv_heads, blocks, 1)``."""
        border = self.origins[..., None] + self.size * torch.arange(first, last + 1, device=self.origins.device)
        seen = torch.minimum(torch.maximum(border, self.starts[..., None]), torch.tensor(n, device=border.device))
        return seen.diff(dim=-1)[..., None]

    def _reserve(self, count: int) -> None:
        if count > self._data.shape[2]:
            batch, heads, have, width = self._data.shape
            data = empty((batch, heads, max(count + 8, 2 * have), width), self._data.dtype, self._data.device)
            if self.kind == "mean":
                data[:, :, have:] = 0
            else:
                data[:, :, have:, : width // 2] = -torch.inf
                data[:, :, have:, width // 2 :] = torch.inf
            data[:, :, :have] = self._data
            self._data = data

    @property
    def count(self) -> int:
        """Blocks of the row that has the most."""
        return max(0, (self.n - self._lowest + self.size - 1) // self.size)

    @property
    def unsettled(self) -> bool:
        """Whether some row had no token yet, so that where its blocks begin was not known when they were made."""
        return self._last >= self._first

    @property
    def counts(self) -> torch.Tensor:
        """Blocks per row and head that hold a token, int64 ``(batch, kv_heads)``: the others come after them."""
        blocks = (self.n - self.origins + self.size - 1) // self.size
        return blocks.masked_fill(self.starts >= self.n, 0)

    @property
    def max(self) -> torch.Tensor:
        """Elementwise largest key ``(batch, kv_heads, blocks, head_dim)``; -inf for an empty block."""
        return self.bounds[..., : self._data.shape[3] // 2]

    @property
    def min(self) -> torch.Tensor:
        """Elementwise smallest key ``(batch, kv_heads, blocks, head_dim)``; inf for an empty block."""
        return self.bounds[..., self._data.shape[3] // 2 :]

    @property
    def bounds(self) -> torch.Tensor:
        """``max`` and ``min`` side by side, ``(batch, kv_heads, blocks, 2 * head_dim)``."""
        return self._view("bounds")

    @property
    def mean(self) -> torch.Tensor:
        """Mean key, float32 ``(batch, kv_heads, blocks, head_dim)``; 0 for an empty block."""
        return self._view("mean")

    def _view(self, kind: str) -> torch.Tensor:
        if kind != self.kind:
            raise LaconicError(f"These blocks hold their {self.kind}: make them with kind='{kind}'.")
        return self._data[:, :, : self.count]

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        """The blocks in which ``slots`` (batch, kv_heads or 1, k) lie, -1 for an empty slot."""
        return ((slots - self.origins[:, : slots.shape[1], None]) // self.size).masked_fill(slots < 0, -1)

    def slots(self, chosen: torch.Tensor) -> torch.Tensor:
        """The slots of blocks ``chosen`` (batch, heads, m), ascending: ``(batch, heads, m * size)``, -1 in front for empty ones.

        ``heads`` is that of the keys, or 1 where all heads have the same blocks. A block -1 has no slots.
        """
        heads = chosen.shape[1]
        first = self.origins[:, :heads, None] + chosen * self.size
        slots = (first[..., None] + torch.arange(self.size, device=chosen.device)).flatten(2)
        outside = (slots < self.starts[:, :heads, None]) | (slots >= self.n)
        return slots.masked_fill(outside | (chosen < 0).repeat_interleave(self.size, -1), -1).sort(dim=-1).values

    @property
    def bytes(self) -> int:
        """Bytes that scoring all blocks reads."""
        return self._data[:, :, : self.count].numel() * self._data.element_size()
