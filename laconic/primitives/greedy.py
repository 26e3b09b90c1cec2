"""One greedy loop for every set that is chosen token by token: the rule says what a token would add to those picked before.

DivPrune, for instance, is ``greedy(features, quota, MaxRule(), seed=most_isolated(features))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic import kernels
from laconic.errors import LaconicError
from laconic.kernels.reference_greedy import unit


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How much a token adds.

    Attributes:
        weight: a number or float ``(batch, n)``, >= 0.
    """

    name: ClassVar[str]
    weight: float | torch.Tensor = 1.0

    def alone(self) -> float | torch.Tensor:
        """What is left of a gain when the similarity to the picked tokens is 0."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class MaxRule(Rule):
    """``offset - weight * s`` with s the largest cosine to a picked token; ``offset`` None is the weight: ``weight * (1 - s)``.

    Diversity (DivPrune, 2025: farthest first), sensitive and different (ZOO-Prune, 2025: weight = sensitivity), maximal
    marginal relevance (Carbonell and Goldstein, 1998; IDPruner, 2026: offset = lam * importance, weight = 1 - lam). Without a
    seed the largest offset is picked first.
    """

    name: ClassVar[str] = "max"
    offset: float | torch.Tensor | None = None

    def alone(self) -> float | torch.Tensor:
        return self.weight if self.offset is None else self.offset


@dataclass(frozen=True, kw_only=True)
class SumRule(Rule):
    """``offset - weight * s`` with s the sum of the cosines to all picked tokens (max-sum diversification; ToDRE v2, 2025)."""

    name: ClassVar[str] = "sum"
    offset: float | torch.Tensor = 0.0

    def alone(self) -> float | torch.Tensor:
        return self.offset


@dataclass(frozen=True, kw_only=True)
class DistanceRule(Rule):
    """``weight`` times the squared Euclidean distance to the nearest picked token (k-center, Gonzalez, 1985). Without a seed the
    lowest valid token is picked first."""

    name: ClassVar[str] = "distance"


@dataclass(frozen=True, kw_only=True)
class CoverageRule(Rule):
    """``weight`` times the sum over things r of what row[r] exceeds the best picked row[r] by, which is 0 with nothing picked.

    Here a token's row says how much it covers each thing (of a matrix with a row per thing, ``matrix.mT`` is read in place).
    Facility location for weight 1 (MMTok, 2025: words and image tokens
    are to be covered); SCOPE (2025) has the tokens' cosines with each other and the weight saliency^alpha.
    """

    name: ClassVar[str] = "coverage"


@dataclass(frozen=True, kw_only=True)
class DeterminantRule(Rule):
    """What a token multiplies the determinant of the picked tokens' kernel by, weight_i * weight_j * cos(i, j).

    The most probable set of a determinantal point process, greedily (Chen, Zhang and Zhou, 2018). Once the picked tokens span
    all others, nothing adds anything, and the lowest are picked.
    """

    name: ClassVar[str] = "determinant"


def greedy(
    rows: torch.Tensor,
    quota: torch.Tensor,
    rule: Rule,
    *,
    seed: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Picks tokens one by one, each time the one that the rule says adds most; ties to the lowest.

    Args:
        rows: float ``(batch, n, d)``: what the rule reads of each token: its features, for ``CoverageRule`` how much it covers
            each of d things. No gradient is kept.
        quota: int ``(batch,)``, >= 0: how many to pick per row; a row with fewer valid tokens gives all of them.
        rule: the gain; computed in float32.
        seed: int64 ``(batch,)``: the first pick of each row. None: the token of largest gain with nothing picked.
        valid: boolean ``(batch, n)``: False (padding, separators) is never picked, nor looked at. None: all are valid.

    Returns:
        int64 ``(batch, largest number picked)`` ascending slots, -1 in front where a row has fewer.

    Raises:
        LaconicError: when features of valid tokens are not finite, a weight is negative, or a seed is not a valid token.
    """
    return greedy_order(rows, quota, rule, seed=seed, valid=valid).sort(dim=-1).values


@torch.no_grad()
def greedy_order(
    rows: torch.Tensor,
    quota: torch.Tensor,
    rule: Rule,
    *,
    seed: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``greedy``, in the order of picking, -1 at the end: the first k of a larger quota are those of the quota k."""
    rows = rows.detach()
    batch, n = rows.shape[:2]
    usable = torch.ones(batch, n, dtype=torch.bool, device=rows.device) if valid is None else valid
    counts = torch.minimum(quota.to(rows.device, torch.int64), usable.sum(-1))
    weight, offset = (_per_token(value, usable) for value in (rule.weight, rule.alone()))
    if bool((usable & ~(weight >= 0)).any()) or not bool(offset[usable].isfinite().all()):
        raise LaconicError(f"{type(rule).__name__}: weights must be numbers of at least 0, and offsets finite.")
    if seed is None:
        seed = torch.full((batch,), -1, device=rows.device)
    elif bool(((seed < 0) | (seed >= n) | ~usable.gather(1, seed[:, None].clamp(0, max(n - 1, 0)))[:, 0])[counts > 0].any()):
        raise LaconicError(f"greedy: a seed is not among the valid ones of {n} tokens: give the slot of a valid token per row.")
    return kernels.greedy(rule.name, rows, weight=weight, offset=offset, usable=usable, seeds=seed, counts=counts)


def _per_token(value: float | torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """Float32 of the shape of ``usable`` (batch, n), 0 where not usable."""
    values = torch.as_tensor(value, dtype=torch.float32, device=usable.device).detach().expand(usable.shape)
    return values.masked_fill(~usable, 0.0)


@torch.no_grad()
def most_isolated(features: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The token whose nearest other token (largest cosine) is farthest away: the first pick of DivPrune (2025).

    The n x n cosines are never held, and most are never computed: a token that has a neighbour nearer than the nearest
    neighbour of another one is out.

    Args:
        features: float ``(batch, n, d)``; valid: boolean ``(batch, n)``, None: all.

    Returns:
        int64 ``(batch,)``, ties to the lowest; a row without valid tokens: -1.
    """
    slots = torch.arange(features.shape[1], device=features.device)
    found = []
    for b, row in enumerate(features.detach()):
        present = slots if valid is None else slots[valid[b]]
        directions = unit(row if valid is None else row[present])
        found.append(present[kernels.most_isolated(directions)] if len(present) else slots.new_tensor(-1))
    return torch.stack(found)
