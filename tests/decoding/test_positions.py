"""Which positions a step commits, against loops that say the same, and against the golden numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.decoding.positions import dilate, draw, negative_entropy, probability, ranks, select

GOLDEN = [0.95, 0.80, 0.76, 0.60, 0.78, 0.77, 0.70, 0.40, 0.91, 0.74]


@st.composite
def rows(draw_):
    """Scores on a coarse grid, so that ties occur, and which positions are open."""
    n = draw_(st.integers(1, 20))
    score = draw_(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    open_ = draw_(st.lists(st.booleans(), min_size=n, max_size=n))
    return torch.tensor([score]) / 20, torch.tensor([open_])


def places(taken):
    return taken[0].nonzero()[:, 0].tolist()


def by_loop(score, open_, threshold, least, relaxed, width, penalty):
    """What ``select`` means, one position at a time."""
    score, open_ = score[0].tolist(), open_[0].tolist()
    free = [i for i in range(len(score)) if open_[i]]
    score = [s - penalty * (i - free[0]) if free else s for i, s in enumerate(score)]
    anchors = [i for i in free if score[i] >= threshold]
    near = [i for i in free if any(abs(i - a) <= width for a in anchors) and score[i] >= relaxed]
    best = sorted(free, key=lambda i: (-score[i], i))[:least]
    return sorted({*anchors, *near, *best})


@settings(max_examples=200, deadline=None)
@given(rows(), st.integers(0, 20), st.integers(0, 20), st.integers(0, 4), st.integers(0, 3), st.sampled_from([0.0, 0.125]))
def test_it_equals_a_loop(row, threshold, relaxed, width, least, penalty):
    score, open_ = row
    choices = {"threshold": threshold / 20, "least": least, "relaxed": relaxed / 20, "width": width, "penalty": penalty}
    score = score.double()
    assert places(select(score, open_, **choices)) == by_loop(score, open_, **choices)


def test_golden_numbers_of_local_leap():
    score, open_ = torch.tensor([GOLDEN]), torch.ones(1, len(GOLDEN), dtype=torch.bool)
    assert places(select(score, open_, threshold=0.9, least=0)) == [0, 8]
    assert places(select(score, open_, threshold=0.9, relaxed=0.75, width=2)) == [0, 1, 2, 8]


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(0, 6))
def test_local_leap_lies_between_the_two_thresholds(row, width):
    score, open_ = row
    strict = select(score, open_, threshold=0.9)
    leap = select(score, open_, threshold=0.9, relaxed=0.75, width=width)
    loose = select(score, open_, threshold=0.75)
    assert not bool((strict & ~leap).any()) and not bool((leap & ~loose).any())
    assert bool(leap.any()) == bool(open_.any()), "at least one, if one is open"
    assert torch.equal(select(score, open_, threshold=0.9, relaxed=0.75, width=0), strict)
    assert torch.equal(select(score, open_, threshold=0.9, relaxed=0.9, width=width), strict)


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([0.0, 0.02, 0.1]))
def test_a_stricter_threshold_or_a_dearer_distance_takes_less(row, first, second, cheap, dear):
    score, open_ = row
    low, high = sorted((first / 20, second / 20))
    cheap, dear = sorted((cheap, dear))
    many = select(score, open_, threshold=low, penalty=cheap, least=0)
    few = select(score, open_, threshold=high, penalty=dear, least=0)
    assert not bool((few & ~many).any())


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(0, 20), st.integers(0, 20))
def test_a_contiguous_run_is_a_prefix_and_grows_with_a_lower_threshold(row, first, second):
    score, open_ = row
    low, high = sorted((first / 20, second / 20))
    runs = [select(score, open_, threshold=value, contiguous=True) for value in (low, high, math.inf)]
    for taken in runs:
        count = int(taken.sum())
        assert places(taken) == open_[0].nonzero()[:count, 0].tolist()
    counts = [int(taken.sum()) for taken in runs]
    assert counts[0] >= counts[1] >= counts[2] == int(open_.any())


def test_distance_is_between_positions_not_columns():
    score, open_ = torch.tensor([[-0.3, -0.1]]), torch.ones(1, 2, dtype=torch.bool)
    assert places(select(score, open_, penalty=0.05)) == [1]
    assert places(select(score, open_, penalty=0.05, places=torch.tensor([4, 14]))) == [0]


def test_old_anchors_reach_as_far_as_new_ones():
    score, open_ = torch.tensor([[0.2, 0.8, 0.8, 0.8]]), torch.tensor([[False, True, True, True]])
    choices = {"threshold": 0.9, "relaxed": 0.75, "width": 2, "least": 0}
    assert places(select(score, open_, **choices)) == []
    assert places(select(score, open_, anchors=~open_, **choices)) == [1, 2]


def test_equal_scores_go_from_left_to_right_and_closed_ones_come_last():
    score = torch.tensor([[0.5, 0.5, 0.5, -math.inf], [0.1, 0.2, 0.3, 0.4]])
    open_ = torch.tensor([[False, True, True, True], [True, True, False, True]])
    assert ranks(score, open_).tolist() == [[3, 0, 1, 2], [2, 1, 3, 0]]


def test_dilation_is_a_distance():
    marked = torch.zeros(1, 9, dtype=torch.bool)
    marked[0, [0, 6]] = True
    assert places(dilate(marked, 2)) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(dilate(marked, 0), marked)


def test_probability_and_entropy_of_a_distribution():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 2] = -math.inf
    law = logits.softmax(-1)
    tokens = logits.argmax(-1)
    torch.testing.assert_close(probability(logits, tokens), law.max(-1).values)
    torch.testing.assert_close(negative_entropy(logits), torch.special.xlogy(law, law).sum(-1))
    assert probability(logits.bfloat16(), tokens).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax(temperature):
    logits, count = torch.tensor([1.0, 0.0, -1.0, 2.0]), 20_000
    drawn = draw(logits.expand(1, count, 4), temperature, torch.Generator().manual_seed(1))
    expected = (logits / temperature).softmax(-1) * count
    chi_square = float(((drawn[0].bincount(minlength=4) - expected) ** 2 / expected).sum())
    assert chi_square < 16.3, "99.9 % of samples of three degrees of freedom lie below"


def test_without_temperature_the_most_probable_token_is_taken():
    logits = torch.tensor([[[0.0, 3.0, 1.0]]])
    assert draw(logits, 0.0).tolist() == [[1]]
