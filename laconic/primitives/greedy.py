"""One greedy loop for every choice of a set: what is picked next depends on what was picked before.

A rule says what each candidate would add and takes note of what is picked. Similarities are computed for one picked token at a
time, so that no n x n matrix is held.
"""

from __future__ import annotations

from typing import Protocol

import torch

BLOCK = 512  # rows whose similarities to all tokens are held at a time
TIE = 1e-6
TOGETHER = 32  # candidates whose gain is computed at once


class Rule(Protocol):
    """What ``greedy`` asks: the gain of every candidate now, and to take note of a pick."""

    def gains(self, among: torch.Tensor) -> torch.Tensor:
        """float32 ``(n,)``: what each candidate of ``among`` would add; the largest is exact, others may be bounds from above."""

    def pick(self, index: int) -> None:
        """``index`` is in the set from now on."""


def greedy(rule: Rule, k: int, among: torch.Tensor, first: int | None = None) -> torch.Tensor:
    """Picks ``k`` times the candidate with the largest gain, the lower index where gains are equal.

    Args:
        among: boolean ``(n,)``: the candidates; at least ``k`` of them.
        first: picked before the loop begins.

    Returns:
        int64 ``(k,)`` in the order of picking; sort it for a selection.
    """
    open_, order = among.clone(), []
    for _ in range(min(k, int(among.sum()))):
        if first is not None and not order:
            best = int(first)
        else:
            best = int(rule.gains(open_).masked_fill(~open_, float("-inf")).argmax())
        order.append(best)
        open_[best] = False
        rule.pick(best)
    return torch.tensor(order, dtype=torch.int64, device=among.device)


class Farthest:
    """Worth, and distance to the nearest token picked: ``weight * (1 - max cosine) + bonus``.

    With nothing else it is the greedy max-min diversity of DivPrune (2025), k-center in another word; with a ``weight`` per token
    ZOO-Prune (2025); with ``share`` the marginal relevance ``share * bonus - (1 - share) * max cosine`` of IDPruner (2026).
    """

    def __init__(
        self, features: torch.Tensor, weight: torch.Tensor | None = None, bonus: torch.Tensor | None = None, share: float = 0.0
    ) -> None:
        self.unit = torch.nn.functional.normalize(features.float(), dim=-1)
        self.weight, self.bonus, self.share = weight, bonus, share
        self.nearest = torch.full((len(features),), -1.0, device=features.device)

    def gains(self, among: torch.Tensor) -> torch.Tensor:
        if self.bonus is not None:
            return self.share * self.bonus - (1 - self.share) * self.nearest
        gain = 1 - self.nearest
        return gain if self.weight is None else self.weight * gain

    def pick(self, index: int) -> None:
        self.nearest = torch.maximum(self.nearest, self.unit @ self.unit[index])


class Dispersed:
    """Minus the sum of the cosines with all picked tokens: greedy max-sum diversification (ToDRE, 2025)."""

    def __init__(self, features: torch.Tensor) -> None:
        self.unit = torch.nn.functional.normalize(features.float(), dim=-1)
        self.total = torch.zeros(len(features), device=features.device)

    def gains(self, among: torch.Tensor) -> torch.Tensor:
        return -self.total

    def pick(self, index: int) -> None:
        self.total = self.total + self.unit @ self.unit[index]


class Covering:
    """How much better the rows of a matrix are covered: the sum over rows of what exceeds the best pick so far.

    Monotone and submodular, so that the greedy set is worth at least 1 - 1/e of the best (Nemhauser et al., 1978; for tokens
    MMTok, 2025; times a ``weight`` per candidate SCOPE, 2025). Gains never rise, so that old ones are bounds: only candidates
    whose bound is still the largest are computed anew.

    Args:
        matrix: float32 ``(rows, n)``, not negative: how well candidate i covers row r.
    """

    def __init__(self, matrix: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        self.columns, self.weight = matrix.float().t().contiguous(), weight
        self.cover = torch.zeros(matrix.shape[0], device=matrix.device)
        self.bounds = self.columns.sum(-1) if weight is None else self.columns.sum(-1) * weight
        self.known = torch.ones(len(self.columns), dtype=torch.bool, device=matrix.device)

    def gains(self, among: torch.Tensor) -> torch.Tensor:
        while True:
            bounds = self.bounds.masked_fill(~among, float("-inf"))
            if bool(self.known[bounds.argmax()]):
                return self.bounds
            stale = bounds.masked_fill(self.known, float("-inf")).topk(min(TOGETHER, len(bounds))).indices
            gain = (self.columns[stale] - self.cover).clamp(min=0).sum(-1)
            self.bounds[stale] = gain if self.weight is None else gain * self.weight[stale]
            self.known[stale] = True

    def pick(self, index: int) -> None:
        self.cover = torch.maximum(self.cover, self.columns[index])
        self.known.fill_(False)


class Determinant:
    """Greedy maximum of a determinantal point process with kernel ``weight_i * cos(i, j) * weight_j`` (Chen et al., 2018).

    The gain is the logarithm of what a candidate adds to the determinant, by an incremental Cholesky factor of ``(k, n)``.
    """

    def __init__(self, features: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        self.rows = unit if weight is None else unit * weight[:, None]
        self.left = (self.rows**2).sum(-1)
        self.factor: list[torch.Tensor] = []

    def gains(self, among: torch.Tensor) -> torch.Tensor:
        return self.left.clamp(min=1e-12).log()

    def pick(self, index: int) -> None:
        row = self.rows @ self.rows[index]
        if self.factor:
            known = torch.stack(self.factor)
            row = row - known.t() @ known[:, index]
        row = row / self.left[index].clamp(min=1e-12).sqrt()
        self.factor.append(row)
        self.left = self.left - row**2


def most_lonely(features: torch.Tensor, among: torch.Tensor) -> int:
    """The candidate whose nearest other candidate is farthest by cosine: where DivPrune begins."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    picked = among.nonzero()[:, 0]
    unit = unit[picked]
    nearest = torch.empty(len(unit), device=unit.device)
    for begin in range(0, len(unit), BLOCK):
        block = unit[begin : begin + BLOCK] @ unit.t()
        block[torch.arange(len(block)), torch.arange(begin, begin + len(block))] = float("-inf")
        nearest[begin : begin + BLOCK] = block.amax(-1)
    lonely = nearest <= nearest.min() + TIE  # two that are each other's nearest are equal but for rounding
    return int(picked[lonely.nonzero()[0, 0]])
