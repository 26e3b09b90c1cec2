from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.primitives.allocate import by_score


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
