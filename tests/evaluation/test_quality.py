"""How much of the dense quality is kept, and the interval over prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from laconic.evaluation.quality import Pairs, prompts_needed, share_kept


def cells(correct: list[float | None], fidelity: float = 0.5) -> list[dict]:
    return [{"correct": value, "fidelity": fidelity} for value in correct]


@pytest.mark.parametrize(
    ("row", "dense", "share"),
    [
        ({"quality": 0.45}, {"quality": 0.9, "quality_name": "exact"}, 0.5),
        ({"quality": 12.5}, {"quality": 10.0, "quality_name": "perplexity"}, 0.8),
        ({"quality": None, "fidelity": 0.7}, {"quality": None, "fidelity": 1.0}, 0.7),
        ({"quality": 0.0}, {"quality": 0.0, "quality_name": "exact"}, 1.0),
        ({"quality": None}, {"quality": 0.9, "quality_name": "exact"}, 0.0),
    ],
)
def test_share_kept(row: dict, dense: dict, share: float) -> None:
    assert share_kept(row, dense) == pytest.approx(share)


def test_pairs_take_the_answered_prompts_or_else_fidelity_or_perplexity() -> None:
    pairs = Pairs.of(cells([1, None, 0, 1]), cells([1, None, 1, 0]))
    assert pairs.mine.tolist() == [1, 0, 1] and pairs.dense.tolist() == [1, 1, 0] and pairs.share == 1.0
    assert Pairs.of(cells([None, None], 0.75), cells([None, None], 1.0)).share == 0.75
    mine = [{"nll": 12.0, "scored": 4}, {"nll": 8.0, "scored": 6}]
    dense = [{"nll": 10.0, "scored": 4}, {"nll": 9.0, "scored": 6}]
    perplexities = [math.exp(sum(cell["nll"] for cell in rows) / 10) for rows in (mine, dense)]
    assert Pairs.of(mine, dense).share == pytest.approx(perplexities[1] / perplexities[0])


def test_what_is_possible_yet_lets_dense_answer_the_rest() -> None:
    dense = cells([1, 1, 0, 1, 1])
    assert Pairs.of(cells([1, 0]), dense).at_best == 0.75
    assert Pairs.of(cells([1, 1, 1, 0, 1]), dense).at_best == 1.0 == Pairs.of(cells([1, 1, 1, 0, 1]), dense).share
    assert Pairs.of([], dense).at_best == 1.0
    assert Pairs.of(cells([0]), dense).guess == 0.5 and Pairs.of(cells([0, 0]), dense).guess == pytest.approx(1 / 3)


def test_where_all_prompts_agree_the_interval_is_wilsons() -> None:
    from scipy.stats import binomtest

    for right, count in ((10, 10), (200, 200)):
        low, high = Pairs(np.ones(count), np.ones(count)).interval()
        known = binomtest(right, count).proportion_ci(0.95, "wilson")
        assert low == pytest.approx(known.low) and high == pytest.approx(known.high)


def test_the_interval_covers_the_true_share() -> None:
    """A recipe that loses 10 % of what dense (90 % right) knows: its 95 % interval may miss that in few of 60 runs."""
    rng, missed = np.random.default_rng(1), 0
    for seed in range(60):
        dense = (rng.random(80) < 0.9).astype(float)
        low, high = Pairs(dense * (rng.random(80) < 0.9), dense).interval(seed=seed)
        missed += not low <= 0.9 <= high
        assert low < high
    assert missed <= 6


def test_the_interval_of_a_perplexity_covers_with_few_prompts_too() -> None:
    rng, missed = np.random.default_rng(2), 0
    for seed in range(100):
        dense = rng.normal(100, 10, 5)
        low, high = Pairs(dense + rng.normal(5, 2, 5), dense, np.full(5, 50)).interval(seed=seed)
        missed += not low <= math.exp(-5 / 50) <= high
    assert missed <= 12  # without the correction it is some 20


def test_the_interval_of_a_perplexity_narrows_with_the_prompts() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (8, 200):
        dense = rng.normal(100, 10, count)
        pairs = Pairs(dense + rng.normal(5, 2, count), dense, np.full(count, 50))
        low, high = pairs.interval()
        assert low < pairs.share < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3 and low < math.exp(-5 / 50) < high


def test_prompts_needed() -> None:
    count = prompts_needed(0.99)
    assert Pairs(np.ones(count), np.ones(count)).interval()[0] >= 0.99
    assert Pairs(np.ones(count - 2), np.ones(count - 2)).interval()[0] < 0.99
    assert prompts_needed(1.0) is None
