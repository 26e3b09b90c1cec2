from __future__ import annotations

import pytest
from attend import Run, held, random_qkv


@pytest.mark.parametrize(("sinks", "budget"), [(4, 10), (0, 7), (1, 2), (9, 10)])
def test_the_first_and_the_newest_stay(sinks: int, budget: int) -> None:
    pads = (0, 5)
    run = Run(f"streaming(sinks={sinks}):{budget}", random_qkv(40), 25, pads=pads)
    for seen, _ in run:
        for row, pad in enumerate(pads):
            real = seen - pad
            expected = [*range(sinks), *range(real - (budget - sinks), real)]
            assert held(run)[row] == [expected, expected]
