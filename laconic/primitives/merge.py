"""Tokens become fewer by averaging. A merge comes back as a function, so that whatever goes with the tokens (values, keys,
positions) can follow the same way (as in ToMe, 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from laconic.errors import LaconicError
from laconic.kernels.reference_greedy import unit
from laconic.primitives.select import marked


@dataclass(frozen=True)
class Merge:
    """Which of n tokens become which of k.

    Attributes:
        slots: int64 ``(batch, k)``, ascending: at which token's place each group stands; -1 in front where a row has fewer.
        group: int64 ``(batch, n)``: the column of ``slots`` that each token goes to; -1: it is dropped.
    """

    slots: torch.Tensor
    group: torch.Tensor

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the members of each group in float32: ``(batch, n, d)`` to ``(batch, k, d)``; an empty one is 0."""
        batch, count = self.slots.shape
        column = torch.where(self.group < 0, count, self.group)[..., None]  # dropped tokens go to one column more
        total = torch.zeros(batch, count + 1, values.shape[-1], device=values.device)
        values = values.float().masked_fill(column == count, 0.0)
        return total.scatter_add(1, column.expand(values.shape), values)[:, :count]

    def sizes(self, before: torch.Tensor | None = None) -> torch.Tensor:
        """How many tokens each group stands for, float32 ``(batch, k)``; ``before`` (batch, n): how many each token does.

        The log of it, added to the logits of merged keys, gives them the attention of all their members (ToMe, 2022).
        """
        before = torch.ones(self.group.shape, device=self.group.device) if before is None else before
        return self.sums(before[..., None])[..., 0]

    def __call__(self, values: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of the members of each group, ``(batch, n, d)`` to ``(batch, k, d)`` in the same type.

        ``weight``: ``(batch, n)``, >= 0, such as the sizes from merges before; groups of weight 0 give their plain mean. A
        token that is alone stays as it is.
        """
        weight = torch.ones(self.group.shape, device=values.device) if weight is None else weight.float()
        weightless = self.sizes(weight) <= 0
        weight = torch.where(self._of(weightless), 1.0, weight)
        mean = self.sums(values.float() * weight[..., None]) / self.sizes(weight).clamp(min=1e-30)[..., None]
        own = values.gather(1, self.slots.clamp(min=0)[..., None].expand(mean.shape))
        alone = (self.sizes() <= 1) & (self.slots >= 0)
        return torch.where(alone[..., None], own, mean.to(values.dtype))

    def _of(self, per_group: torch.Tensor) -> torch.Tensor:
        """What each token's group has: ``(batch, k)`` to ``(batch, n)``."""
        if not per_group.shape[1]:
            return per_group.new_zeros(self.group.shape)
        return per_group.gather(1, self.group.clamp(min=0)) & (self.group >= 0)


def _numbered(slots: torch.Tensor, n: int) -> torch.Tensor:
    """The column of ``slots`` (batch, k) in which each of n tokens stands; -1: none. int64 ``(batch, n)``."""
    column = torch.full((slots.shape[0], n + 1), -1, dtype=torch.int64, device=slots.device)
    columns = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape)
    return column.scatter_(1, torch.where(slots < 0, n, slots), columns)[:, :n]


def assign_and_merge(keys: torch.Tensor, kept: torch.Tensor, valid: torch.Tensor | None = None) -> Merge:
    """Every token that is not kept joins the kept one of largest key cosine, the lowest of equal ones (VisionZip, 2024).

    Args:
        keys: float ``(batch, n, d)``.
        kept: int64 ``(batch, k)`` ascending, -1 in front; a row that keeps nothing drops all.
        valid: boolean ``(batch, n)``: the others are dropped. None: all are valid.

    Returns:
        the merge, with ``kept`` as its slots.
    """
    directions = unit(keys.detach())
    targets = directions.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, keys.shape[-1]))
    cosines = (directions @ targets.mT).masked_fill((kept < 0)[:, None], float("-inf"))
    own = _numbered(kept, keys.shape[1])
    nearest = cosines.argmax(-1) if kept.shape[1] else own
    lost = (kept < 0).all(-1, keepdim=True) if valid is None else (kept < 0).all(-1, keepdim=True) | ~valid
    return Merge(kept, torch.where(own >= 0, own, nearest.masked_fill(lost, -1)))


def bipartite_merge(
    keys: torch.Tensor, count: int, *, fixed: torch.Tensor | None = None, valid: torch.Tensor | None = None
) -> Merge:
    """Bipartite soft matching (ToMe: Token Merging, 2022): of the tokens at even places, the ``count`` that are most similar to
    one at an odd place join that one.

    Args:
        keys: float ``(batch, n, d)``.
        count: how many tokens go, at most the even places that may merge (half of all).
        fixed: boolean ``(batch, n)``: these (a class token, for instance) neither go nor are joined.
        valid: boolean ``(batch, n)``: the others are dropped. None: all are valid. Places are counted among the valid ones.

    Returns:
        the merge; its slots are those that stay, in their order, where the paper puts the even ones first.
    """
    if count < 0:
        raise LaconicError(f"bipartite_merge: {count} tokens cannot be merged: give 0 or more.")
    batch, n = keys.shape[:2]
    here = torch.ones(batch, n, dtype=torch.bool, device=keys.device) if valid is None else valid
    free = here if fixed is None else here & ~fixed
    even = (here.cumsum(-1) - 1) % 2 == 0
    directions = unit(keys.detach())
    best = keys.new_full((batch, n), float("-inf"), dtype=torch.float32)
    partner = torch.zeros(batch, n, dtype=torch.int64, device=keys.device)
    for b in range(batch):  # one row at a time: each has its own halves
        sources, targets = (free[b] & even[b]).nonzero()[:, 0], (free[b] & ~even[b]).nonzero()[:, 0]
        if len(targets):
            best[b, sources], nearest = (directions[b, sources] @ directions[b, targets].T).max(-1)
            partner[b, sources] = targets[nearest]
    rank = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    goes = (rank < count) & (best > float("-inf"))
    slots = marked(here & ~goes)
    at = torch.where(goes, partner, torch.arange(n, device=keys.device))
    return Merge(slots, _numbered(slots, n).gather(1, at))


def group_merge(groups: torch.Tensor, worth: torch.Tensor | None = None) -> Merge:
    """Tokens with the same number become one, which stands at the place of the worthiest, the lowest of equal ones.

    Args:
        groups: int64 ``(batch, n)``; -1: the token stays alone; below -1: it is dropped.
        worth: float ``(batch, n)``. None: the first member.

    Returns:
        the merge, its groups in the order of their places.
    """
    batch, n = groups.shape
    token = torch.arange(n, device=groups.device)
    worth = torch.zeros(batch, n, device=groups.device) if worth is None else worth.float()
    key = torch.where(groups == -1, groups.amax().clamp(min=-1) + 1 + token, groups)  # numbers of their own
    order = worth.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(1, key.gather(1, order).argsort(dim=-1, stable=True))  # by group, the worthiest first
    sorted_key = key.gather(1, order)
    begins = torch.ones_like(sorted_key, dtype=torch.bool)
    begins[:, 1:] = sorted_key[:, 1:] != sorted_key[:, :-1]
    begin = torch.where(begins, token, 0).cummax(-1).values
    head = torch.empty_like(order).scatter_(1, order, order.gather(1, begin))  # the token at whose place each one ends
    slots = marked((head == token) & (groups >= -1))
    return Merge(slots, _numbered(slots, n).gather(1, head))


def grid_cells(height: int, width: int, size: float) -> torch.Tensor:
    """Cell of each token of a grid in raster order, int64 ``(height * width,)``: floor(row / size), floor(column / size).

    ``size`` is at least 1 and need not be whole (VFlowOpt, 2025). For ``group_merge``.
    """
    if size < 1:
        raise LaconicError(f"grid_cells: cells of {size} tokens are smaller than a token: give a size of at least 1.")
    rows, columns = ((torch.arange(count) / size).floor().long() for count in (height, width))
    return (rows[:, None] * math.ceil(width / size) + columns).flatten()
