from __future__ import annotations

import pytest
import torch
from attend import SCALE, Run, attention, held, probabilities, random_qkv, top


@pytest.mark.parametrize("per_head", [False, True])
def test_what_the_newest_token_attends_to_least_is_dropped(per_head: bool) -> None:
    budget, pads = 8, (0, 6)
    qkv = random_qkv(36)
    run = Run(f"tova(per_head={per_head}):{budget}", qkv, 24, pads=pads)
    before: dict[tuple[int, int], list[int]] = {}
    for seen, output in run:
        for row, pad in enumerate(pads):
            newest = seen - 1 - pad
            kept = [[*before.get((row, head), range(newest)), newest] for head in range(2)]
            received = []  # per query head: probability of each entry
            for head in range(4):
                entries = kept[head // 2]
                p = probabilities(qkv[0][row, head, seen - 1], qkv[1][row, head // 2], [e + pad for e in entries])
                received.append(p.tolist())
                by_hand = attention(run, row, head, seen - 1, [e + pad for e in entries])
                torch.testing.assert_close(output[row, head, -1], by_hand, atol=1e-5, rtol=1e-5)
            for head in range(2):
                heads = range(2 * head, 2 * head + 2) if per_head else range(4)
                score = [sum(received[h][i] for h in heads) for i in range(len(kept[head]))]
                worth = dict(zip(kept[head], score, strict=True))
                worth.pop(newest)  # the newest token itself is protected
                before[row, head] = sorted([*top(worth, budget - 1), newest])
                assert held(run)[row][head] == before[row, head]
    if not per_head:
        assert before[0, 0] == before[0, 1]


def test_logits_are_capped_before_they_are_compared() -> None:
    cap, query, keys = 1.0, *random_qkv(30)[:2]
    run = Run("tova(per_head=true):6", random_qkv(30), 30, softcap=cap)
    next(iter(run))
    for head in range(2):
        received = torch.zeros(30)
        for h in (2 * head, 2 * head + 1):
            logits = keys[0, head] @ query[0, h, -1] * SCALE
            received += (cap * torch.tanh(logits / cap)).softmax(0)
        worth = {i: float(w) for i, w in enumerate(received[:-1])}
        assert held(run)[0][head] == sorted([*top(worth, 5), 29])
