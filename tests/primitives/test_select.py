from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError
from laconic.primitives.select import coverage, hide, keep_top, quota_top, threshold


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_keep_top_equals_brute_force(data: st.DataObject) -> None:
    n, batch = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 3))
    heads = data.draw(st.sampled_from([1, 2]))
    sinks, recent = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randint(-3, 4, (batch, heads, n), generator=generator).float()  # many ties
    start = torch.tensor([data.draw(st.integers(0, n - 1)) for _ in range(batch)])
    quota = torch.tensor([data.draw(st.integers(min(sinks + recent, n - s) or 1, n)) for s in start.tolist()])
    quota = torch.minimum(quota, n - start)
    picked = keep_top(scores, quota, start[:, None].expand(-1, 2), sinks, recent)
    assert picked.shape == (batch, heads, int(quota.max()))
    for row in range(batch):
        first = int(start[row])
        safe = {*range(first, min(first + sinks, n)), *range(max(first, n - recent), n)}
        for head in range(heads):
            others = sorted((s for s in range(first, n) if s not in safe), key=lambda s: (-scores[row, head, s], s))
            expected = sorted([*safe, *others[: int(quota[row]) - len(safe)]])
            empty = picked.shape[-1] - len(expected)
            assert picked[row, head].tolist() == [-1] * empty + expected


def test_no_starts_means_all_are_visible_and_ties_go_to_the_lowest() -> None:
    assert keep_top(torch.zeros(1, 1, 6), torch.tensor([3])).tolist() == [[[0, 1, 2]]]
    assert keep_top(torch.zeros(1, 1, 6), torch.tensor([3]), sinks=1, recent=1).tolist() == [[[0, 1, 5]]]


def test_the_newest_may_be_protected_row_by_row() -> None:
    scores = torch.arange(8.0).flip(0).expand(2, 1, -1)
    picked = keep_top(scores, torch.tensor([4, 4]), recent=torch.tensor([1, 3]))
    assert picked.tolist() == [[[0, 1, 2, 7]], [[0, 5, 6, 7]]]


def test_one_choice_for_heads_that_see_different_slots() -> None:
    starts = torch.tensor([[0, 4]])
    picked = keep_top(torch.tensor([[[9.0, 1, 8, 1, 7, 6]]]), torch.tensor([4]), starts)
    assert picked.tolist() == [[[0, 2, 4, 5], [-1, -1, 4, 5]]]


def test_protected_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LaconicError, match="budget of 4 tokens cannot hold the 3 first and 2 newest"):
        keep_top(torch.zeros(1, 1, 9), torch.tensor([4]), sinks=3, recent=2, name="mine")
    assert keep_top(torch.zeros(1, 1, 4), torch.tensor([4]), sinks=3, recent=2).tolist() == [[[0, 1, 2, 3]]]


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(LaconicError):
        keep_top(torch.tensor([[[0.0, float("nan"), 1.0]]]), torch.tensor([2]))


def test_hide_tells_heads_apart_only_where_it_must() -> None:
    slots = torch.tensor([[[0, 3, 5]]])
    assert hide(slots, None) is slots
    assert hide(slots, torch.tensor([[1, 1]])).tolist() == [[[-1, 3, 5]]]
    assert hide(slots, torch.tensor([[0, 4]])).tolist() == [[[0, 3, 5], [-1, -1, 5]]]


def test_threshold() -> None:
    assert threshold(torch.tensor([0.1, 0.5, 0.7]), 0.5).tolist() == [False, False, True]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_coverage_is_the_smallest_set_with_the_mass(weights: list[int], mass: float) -> None:
    if not sum(weights):
        return
    chosen = coverage(torch.tensor([weights], dtype=torch.float64), mass)[0].tolist()
    goal = mass * sum(weights)
    best, count = 0.0, 0
    for weight in sorted(weights, reverse=True):
        if best >= goal:
            break
        best, count = best + weight, count + 1
    assert sum(chosen) == count
    assert sum(w for w, c in zip(weights, chosen, strict=True) if c) == best >= goal - 1e-9


def test_a_quota_per_head() -> None:
    scores = torch.tensor([[[1.0, 5, 3, 3], [9.0, 8, 7, 6]]])
    assert quota_top(scores, torch.tensor([[3, 1]])).tolist() == [[[1, 2, 3], [-1, -1, 0]]]
    assert quota_top(scores, torch.tensor([[0, 2]])).tolist() == [[[-1, -1], [0, 1]]]


def test_a_row_of_padding_keeps_nothing() -> None:
    """The first piece of a prompt that is read in pieces can be all padding in a short row."""
    scores, starts = torch.arange(4.0).expand(2, 2, -1), torch.tensor([[0, 0], [4, 4]])
    picked = keep_top(scores, torch.tensor([2, 0]), starts, recent=1)
    assert picked.tolist() == [[[2, 3]] * 2, [[-1, -1]] * 2]
    assert keep_top(scores, torch.tensor([0, 0]), torch.full((2, 2), 4)).shape == (2, 2, 0)
