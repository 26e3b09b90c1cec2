from __future__ import annotations

import pytest
import torch

from laconic import LaconicError
from laconic.primitives.reduce import group, pool


def test_groups_are_contiguous_query_heads() -> None:
    scores = torch.tensor([[[1.0], [3.0], [10.0], [30.0]]])
    assert group(scores, 2, "mean").tolist() == [[[2.0], [20.0]]]
    assert group(scores, 2, "max").tolist() == [[[3.0], [30.0]]]
    assert group(scores, 2, "sum").tolist() == [[[4.0], [40.0]]]
    assert torch.equal(group(scores, 4), scores)
    with pytest.raises(LaconicError, match="median"):
        group(scores, 2, "median")


@pytest.mark.parametrize("how", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_pooling_equals_brute_force_and_keeps_the_length(how: str, kernel: int) -> None:
    scores = torch.rand(2, 2, 15)
    starts = torch.tensor([[0, 0], [4, 4]])
    scores[1, :, :4] = 0  # padding
    pooled = pool(scores, kernel, how, starts)
    for row in range(2):
        for head in range(2):
            first = int(starts[row, head])
            for i in range(first, 15):
                near = scores[row, head, max(first, i - kernel // 2) : i + kernel // 2 + 1]
                expected = near.mean() if how == "avg" else near.max()
                torch.testing.assert_close(pooled[row, head, i], expected)


def test_widths_that_shift_and_unknown_kinds_are_refused() -> None:
    scores = torch.rand(1, 1, 9)
    assert pool(scores, 1) is scores
    for wrong in ((4, "avg"), (3, "median")):
        with pytest.raises(LaconicError):
            pool(scores, *wrong)
