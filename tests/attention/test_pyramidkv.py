from __future__ import annotations

from itertools import pairwise

import pytest
from attend import Run, held, random_qkv
from hypothesis import given
from hypothesis import strategies as st

from laconic import get
from laconic.errors import LaconicError


def kept(recipe: str, layer: int, layers: int, n: int = 60) -> list[int]:
    run = Run(recipe, random_qkv(n, batch=1), n, layer=layer, layers=layers)
    run.piece(0, n)
    return held(run)[0][0]


@given(
    mean=st.integers(1, 300), visible=st.integers(1, 600), layers=st.integers(2, 40), window=st.integers(1, 64),
    beta=st.floats(1, 100),
)  # fmt: skip
def test_layers_lie_on_a_line_and_share_the_budget(mean: int, visible: int, layers: int, window: int, beta: float) -> None:
    mean = min(mean, visible)
    method = get("pyramidkv", window=window, beta=beta)
    shares = [method.share(mean, visible, layer, layers) for layer in range(layers)]
    assert sum(shares) == mean * layers
    assert all(1 <= share <= visible for share in shares)
    steps = [a - b for a, b in pairwise(shares)]
    assert min(steps) >= -1 and max(steps) - min(steps) <= 3  # a line, rounded
    if mean > window:
        assert min(shares) >= window


def test_a_layer_keeps_its_share_of_what_snapkv_would() -> None:
    sizes = [len(kept("pyramidkv(window=4, beta=4):20", layer, 3)) for layer in range(3)]
    assert sizes == [32, 20, 8]
    for layer, size in enumerate(sizes):
        assert kept("pyramidkv(window=4, beta=4):20", layer, 3) == kept(f"snapkv(window=4):{size}", 0, 1)


def test_without_a_slope_it_is_snapkv() -> None:
    for layer in range(3):
        assert kept("pyramidkv(window=4, beta=1):20", layer, 3) == kept("snapkv(window=4):20", layer, 3)


def test_a_pyramid_in_a_pyramid_is_refused() -> None:
    with pytest.raises(LaconicError, match="its own pyramid"):
        get("pyramidkv", budget="pyramid:10%")
