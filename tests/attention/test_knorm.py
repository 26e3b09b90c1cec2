from __future__ import annotations

from attend import Run, held, random_qkv, top


def test_the_smallest_keys_stay() -> None:
    """At every step: the best of what was held and the newcomer, besides the protected ends."""
    sinks, recent, budget, pads = 2, 3, 9, (0, 7)
    qkv = random_qkv(45)
    run = Run(f"knorm(sinks={sinks}, recent={recent}):{budget}", qkv, 30, pads=pads)
    for row_pad in pads:
        assert 30 - row_pad > budget
    before: dict[tuple[int, int], list[int]] = {}
    for seen, _ in run:
        for row, pad in enumerate(pads):
            for head in range(2):
                real = seen - pad
                candidates = [*before.get((row, head), range(real - 1)), real - 1]
                norm = {p: -float(qkv[1][row, head, p + pad].norm()) for p in candidates}
                ends = {*candidates[:sinks], *candidates[-recent:]}
                inner = {p: s for p, s in norm.items() if p not in ends}
                expected = sorted(ends | set(top(inner, budget - len(ends))))
                assert held(run)[row][head] == expected
                before[row, head] = expected
