"""The greedy loop against choosing by hand from the whole matrix of similarities."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.primitives.greedy import Covering, Determinant, Dispersed, Farthest, greedy, most_lonely


def features(n: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def cosines(x: torch.Tensor) -> torch.Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.t()


def by_hand(gain, n: int, k: int, first: int | None = None, among: set[int] | None = None) -> list[int]:
    """``gain(candidate, picked)``, from scratch in every step; ties to the lower index."""
    picked: list[int] = [] if first is None else [first]
    while len(picked) < k:
        rest = [i for i in range(n) if i not in picked and (among is None or i in among)]
        picked.append(max(rest, key=lambda i: (round(float(gain(i, picked)), 5), -i)))
    return picked


everything = lambda n: torch.ones(n, dtype=torch.bool)  # noqa: E731


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 24), st.integers(0, 50))
def test_every_rule_picks_what_the_formula_says(n: int, seed: int) -> None:
    x, k = features(n, seed=seed), max(2, n // 3)
    c, w = cosines(x), torch.rand(n, generator=torch.Generator().manual_seed(seed))

    def distance(i: int, picked: list[int]) -> float:
        return 1 - max(c[i, j] for j in picked)

    start = most_lonely(x, everything(n))
    lonely = [max(c[i, j] for j in range(n) if j != i) for i in range(n)]
    assert start == min(range(n), key=lambda i: (round(float(lonely[i]), 5), i))
    assert greedy(Farthest(x), k, everything(n), start).tolist() == by_hand(distance, n, k, start)
    assert greedy(Farthest(x, weight=w), k, everything(n), 1).tolist() == by_hand(lambda i, p: w[i] * distance(i, p), n, k, 1)
    relevance = lambda i, p: 0.4 * w[i] - 0.6 * max(c[i, j] for j in p)  # noqa: E731
    assert greedy(Farthest(x, bonus=w, share=0.4), k, everything(n), 0).tolist() == by_hand(relevance, n, k, 0)
    assert greedy(Dispersed(x), k, everything(n), 2).tolist() == by_hand(lambda i, p: -sum(c[i, j] for j in p), n, k, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 20), st.integers(0, 50), st.booleans())
def test_lazy_coverage_is_coverage(n: int, seed: int, weighted: bool) -> None:
    matrix = torch.rand(7, n, generator=torch.Generator().manual_seed(seed))
    w = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) if weighted else None

    def gain(i: int, picked: list[int]) -> float:
        cover = matrix[:, picked].amax(-1) if picked else torch.zeros(7)
        return (matrix[:, i] - cover).clamp(min=0).sum() * (1.0 if w is None else w[i])

    k = n // 2
    assert greedy(Covering(matrix, w), k, everything(n)).tolist() == by_hand(gain, n, k)
    among = torch.arange(n) % 3 != 0
    k = int(among.sum()) // 2
    expected = by_hand(gain, n, k, among=set(among.nonzero()[:, 0].tolist()))
    assert greedy(Covering(matrix, w), k, among).tolist() == expected


def test_coverage_is_near_the_best_set_and_gains_fall() -> None:
    for seed in range(10):
        matrix = torch.rand(8, 12, generator=torch.Generator().manual_seed(seed))

        def value(chosen: tuple[int, ...] | list[int], matrix: torch.Tensor = matrix) -> float:
            return float(matrix[:, list(chosen)].amax(-1).sum())

        order = greedy(Covering(matrix), 3, everything(12)).tolist()
        best = max(value(s) for s in itertools.combinations(range(12), 3))
        assert value(order) >= 0.63 * best
        steps = [value(order[: i + 1]) - (value(order[:i]) if i else 0.0) for i in range(3)]
        assert steps[0] >= steps[1] >= steps[2] >= 0


def test_the_determinant_grows_the_most() -> None:
    for seed in range(8):
        x = features(9, dim=7, seed=seed)
        c = cosines(x).double()
        order = greedy(Determinant(x), 5, everything(9)).tolist()
        picked: list[int] = []
        for index in order:
            grown = {i: float(torch.linalg.det(c[[*picked, i]][:, [*picked, i]])) for i in range(9) if i not in picked}
            assert grown[index] >= max(grown.values()) - 1e-5
            picked.append(index)


def test_what_is_no_candidate_is_never_picked_and_ties_go_to_the_lower() -> None:
    x = torch.ones(6, 3)
    among = torch.tensor([False, True, True, False, True, True])
    for make in (lambda: Farthest(x), lambda: Dispersed(x), lambda: Determinant(x), lambda: Covering(torch.ones(2, 6))):
        assert greedy(make(), 4, among).tolist()[0] == 1
        assert sorted(greedy(make(), 9, among).tolist()) == [1, 2, 4, 5]


def test_sets_are_nested_and_do_not_change_when_features_turn_or_grow() -> None:
    x = features(30, dim=5)
    turn = torch.linalg.qr(features(5, dim=5, seed=9)).Q
    start = most_lonely(x, everything(30))
    ten = greedy(Farthest(x), 10, everything(30), start).tolist()
    assert greedy(Farthest(x), 6, everything(30), start).tolist() == ten[:6]
    grown = x @ turn * torch.rand(30, 1, generator=torch.Generator().manual_seed(3)).add(0.5)
    assert greedy(Farthest(grown), 10, everything(30), most_lonely(grown, everything(30))).tolist() == ten


@pytest.mark.parametrize("k", [2, 5])
def test_a_copy_of_what_is_picked_comes_last(k: int) -> None:
    x = torch.cat([features(6), features(6)])
    order = greedy(Farthest(x), 6, everything(12), 0).tolist()
    assert len({i % 6 for i in order}) == 6
