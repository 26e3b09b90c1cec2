"""How many picture tokens each layer of the language model still has."""

from __future__ import annotations

import itertools

from laconic.budget import Budget

FIRST = 0.75  # of the budget is what the layers before the first drop take at most, where they can be fewer


def layer_at(share: float, layers: int) -> int:
    """The last layer of the first ``share`` of all ``layers``, counted from 0: at least the first, never the last."""
    return min(max(round(share * layers), 1), layers - 1) - 1


def falling(budget: Budget, n: int, layers: int, stages: int, given: int | None = None) -> dict[int, int]:
    """After the last layer of each of ``stages`` groups but the last, how many of ``n`` tokens are left: each time the same
    share, so that the mean over the layers is the budget.

    The groups are of equal length, but the first ones shorter, never empty, where they would take too much of the budget.
    ``given``: how many of them the first layer is given, where not all; the budget stays that of ``n``, and nothing leaves where
    it allows as many.
    """
    given = n if given is None else given
    mean = min(1.0, budget.tokens(n) / max(given, 1))
    ends = [round(layers * (i + 1) / stages) for i in range(min(stages, layers) - 1)]
    ends = sorted({min(max(end, i + 1), layers - 1) for i, end in enumerate(ends)})
    while ends[0] > 1 and ends[0] / layers > FIRST * mean:
        ends = sorted({max(i + 1, end - 1) for i, end in enumerate(ends)})
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        low, high = (share, high) if mean_over_layers(share, ends, layers) < mean else (low, share)
    return {end - 1: max(1, min(given, round(given * high ** (i + 1)))) for i, end in enumerate(ends)}


def mean_over_layers(share: float, ends: list[int], layers: int) -> float:
    """Mean share of the tokens that layers have, where ``share`` of them go on at each of ``ends`` (layers counted from 1)."""
    borders = [0, *ends, layers]
    return sum((b - a) * share**i for i, (a, b) in enumerate(itertools.pairwise(borders))) / layers
