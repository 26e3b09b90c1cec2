from __future__ import annotations

import torch
from attend import Run, held, random_qkv, top


def test_keys_unlike_the_mean_direction_stay() -> None:
    """At every step, by hand: the mean is over what is held and real."""
    sinks, recent, budget, pads = 2, 3, 9, (0, 7)
    qkv = random_qkv(45)
    before: dict[tuple[int, int], list[int]] = {}
    for seen, _ in (run := Run(f"keydiff(sinks={sinks}, recent={recent}):{budget}", qkv, 30, pads=pads)):
        for row, pad in enumerate(pads):
            for head in range(2):
                real = seen - pad
                candidates = [*before.get((row, head), range(real - 1)), real - 1]
                keys = torch.stack([qkv[1][row, head, p + pad] for p in candidates])
                anchor = (keys / keys.norm(dim=-1, keepdim=True)).mean(0)
                likeness = torch.nn.functional.cosine_similarity(keys, anchor[None])
                worth = {p: -float(c) for p, c in zip(candidates, likeness, strict=True)}
                ends = {*candidates[:sinks], *candidates[-recent:]}
                inner = {p: s for p, s in worth.items() if p not in ends}
                before[row, head] = sorted(ends | set(top(inner, budget - len(ends))))
                assert held(run)[row][head] == before[row, head]


def test_one_odd_key_among_equals_is_kept() -> None:
    query, keys, values = random_qkv(60, batch=1)
    keys[:] = torch.randn(8, generator=torch.Generator().manual_seed(1)) + 0.01 * keys
    keys[0, 1, 33] *= -1
    run = Run("keydiff(sinks=0, recent=1):4", [query, keys, values], 60)
    run.piece(0, 60)
    assert 33 in held(run)[0][1] and 33 not in held(run)[0][0]
