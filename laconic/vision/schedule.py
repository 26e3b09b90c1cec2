"""How many picture tokens each layer of the language model still has."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from laconic.budget import Budget

FIRST = 0.75  # of the budget is what the layers before the first drop take at most, where they can be fewer


def layer_at(share: float, layers: int) -> int:
    """The last layer of the first ``share`` of all ``layers``, counted from 0: at least the first, never the last."""
    return min(max(round(share * layers), 1), layers - 1) - 1


@functools.lru_cache(maxsize=1024)  # every layer of a forward asks
def falling(budget: Budget, n: int, layers: int, stages: int, given: tuple[int, ...] | None = None) -> dict[int, int]:
    """After the last layer of each of ``stages`` groups but the last, how many of ``n`` tokens are left: each time the same
    share, so that the mean over the layers is the budget.

    The groups are of equal length, but the first ones shorter, never empty, where they would take too much of the budget.
    ``given``: how many of them each layer has by what other methods leave, never more than the one before; None for all in all
    layers. The budget stays that of ``n``, and nothing more leaves where it allows as many.
    """
    given = (n,) * layers if given is None else given
    total = min(budget.tokens(n) * layers, sum(given))
    ends = [round(layers * (i + 1) / stages) for i in range(min(stages, layers) - 1)]
    ends = sorted({min(max(end, i + 1), layers - 1) for i, end in enumerate(ends)})
    while ends[0] > 1 and sum(given[: ends[0]]) > FIRST * total:
        ends = sorted({max(i + 1, end - 1) for i, end in enumerate(ends)})
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        low, high = (share, high) if sum(stepwise(share, ends, given)) < total else (low, share)
    counts = stepwise(high, ends, given)
    return {end - 1: max(1, min(given[0], round(counts[end - 1] * high))) for end in ends}


def stepwise(share: float, ends: Sequence[int], given: Sequence[int]) -> list[float]:
    """How many tokens each layer has, where of ``given`` ones ``share`` go on at each of ``ends`` (layers counted from 1)."""
    counts, count = [], float("inf")
    for layer, most in enumerate(given):
        count = min(count * share if layer in ends else count, most)
        counts.append(count)
    return counts


def thinned(given: Sequence[int], drops: Mapping[int, int]) -> tuple[int, ...]:
    """How many tokens each layer has of ``given`` ones, where ``drops`` say how many are left at most after which layers."""
    counts, most = [], given[0]
    for layer, count in enumerate(given):
        most = min(most, count)
        counts.append(most)
        most = min(most, drops.get(layer, most))
    return tuple(counts)
