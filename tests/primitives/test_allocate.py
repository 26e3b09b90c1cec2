from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.primitives.allocate import by_score, largest_remainder


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 60), st.integers(0, 5), st.integers(0, 10**6))
def test_heads_own_what_is_best_of_all(heads: int, n: int, total: int, floor: int, seed: int) -> None:
    scores = torch.rand(2, heads, n, generator=torch.Generator().manual_seed(seed))
    quota = by_score(scores, total, floor=floor)
    least = min(floor, n)
    for row in range(2):
        assert int(quota[row].sum()) == max(min(total, heads * n), heads * least)
        assert int(quota[row].min()) >= least
        if floor == 0:
            best = scores[row].flatten().topk(min(total, heads * n)).indices
            assert quota[row].tolist() == [int(((best // n) == head).sum()) for head in range(heads)]


def ideal_shares(weights: list[int], total: int, caps: list[int]) -> list[Fraction]:
    """By the definition: share, fix those that reach their caps, share what is left again."""
    shares, left = [Fraction(0)] * len(caps), Fraction(min(total, sum(caps)))
    uncapped = set(range(len(caps)))
    while uncapped:
        weight = sum(weights[i] for i in uncapped)
        part = {i: left * weights[i] / weight if weight else left / len(uncapped) for i in uncapped}
        full = {i for i in uncapped if part[i] >= caps[i]}
        if not full:
            full, caps = uncapped, [part.get(i, c) for i, c in enumerate(caps)]
        for i in full:
            shares[i] = Fraction(caps[i])
            left -= shares[i]
        uncapped = uncapped - full
    return shares


PLACES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(PLACES, st.integers(0, 120), st.sampled_from([1e-12, 1.0, 1e9]))
def test_largest_remainders_are_as_defined(places: list[tuple[int, int]], total: int, scale: float) -> None:
    weights, caps = ([place[part] for place in places] for part in (0, 1))
    shares = ideal_shares(weights, total, caps)
    expected = [int(share) for share in shares]
    open_places = sorted((i for i, c in enumerate(caps) if expected[i] < c), key=lambda i: (expected[i] - shares[i], i))
    for i in open_places[: min(total, sum(caps)) - sum(expected)]:
        expected[i] += 1
    got = largest_remainder(torch.tensor(weights, dtype=torch.float64) * scale, torch.tensor(total), torch.tensor(caps))
    assert got.tolist() == expected
    assert sum(expected) == min(total, sum(caps)) and all(abs(a - x) < 1 for a, x in zip(expected, shares, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6, width=32), st.integers(0, 3000)), min_size=1, max_size=8), st.integers(0, 9000))
def test_largest_remainders_keep_their_promises(places: list[tuple[float, int]], total: int) -> None:
    weights, caps = (torch.tensor(column) for column in zip(*places, strict=True))
    got = largest_remainder(weights, torch.tensor(total), caps)
    assert got.dtype == torch.int64 and int(got.sum()) == min(total, int(caps.sum()))
    assert bool((got >= 0).all()) and bool((got <= caps).all())
    zero = weights == 0
    assert not bool(got[zero].any()) or torch.equal(got[~zero], caps[~zero])


def test_largest_remainders_of_several_rows_and_ties() -> None:
    weights = torch.tensor([[1.0, 1, 1, 0], [0.0, 0, 0, 0], [5.0, 1, 0, 0]])
    caps = torch.tensor([[9, 9, 9, 9], [9, 1, 9, 9], [2, 1, 9, 9]])
    got = largest_remainder(weights, torch.tensor([4, 6, 8]), caps)
    assert got.tolist() == [[2, 1, 1, 0], [2, 1, 2, 1], [2, 1, 3, 2]]
