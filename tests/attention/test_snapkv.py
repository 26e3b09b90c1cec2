from __future__ import annotations

import pytest
import torch
from attend import Run, held, probabilities, random_qkv, top

from laconic import LaconicError
from laconic.attention.base import Call
from laconic.registry import get


@pytest.mark.parametrize(("window", "kernel", "sinks"), [(4, 1, 0), (4, 5, 0), (6, 7, 2), (1, 3, 0)])
def test_the_prompt_is_cut_to_what_its_last_window_attends_to(window: int, kernel: int, sinks: int) -> None:
    budget, prompt, pads = 12, 32, (0, 9)
    qkv = random_qkv(prompt + 5)
    run = Run(f"snapkv(window={window}, kernel={kernel}, sinks={sinks}):{budget}", qkv, prompt, pads=pads)
    for seen, _ in run:
        for row, pad in enumerate(pads):
            n = prompt - pad
            for head in range(2):
                mean = [0.0] * n
                for h in (2 * head, 2 * head + 1):
                    for at in range(n - window, n):
                        p = probabilities(qkv[0][row, h, at + pad], qkv[1][row, head], list(range(pad, at + pad + 1)))
                        for i, value in enumerate(p.tolist()):
                            mean[i] += value / 2
                reach = kernel // 2
                smooth = [mean[max(0, i - reach) : i + reach + 1] for i in range(n)]
                worth = {i: sum(near) / len(near) for i, near in enumerate(smooth) if sinks <= i < n - window}
                chosen = top(worth, budget - window - sinks)
                expected = [*range(sinks), *chosen, *range(n - window, n)]
                generated = list(range(n, seen - pad))  # these all stay
                assert held(run)[row][head] == expected + generated


def test_the_window_of_a_short_second_prompt_reaches_into_the_first() -> None:
    qkv = random_qkv(40, batch=1)
    run = Run("snapkv(window=8):12", qkv, 30)
    run.piece(0, 30)
    first = held(run)[0]
    run.piece(30, 33)  # three new tokens, a window of eight
    for head, kept in enumerate(held(run)[0]):
        assert len(kept) == 12 and set(range(30, 33)) <= set(kept)
        assert set(first[head][-5:]) <= set(kept)


def test_the_score_asks_only_the_window() -> None:
    """Queries before the window have no say."""
    method, qkv = get("snapkv", window=4, budget="8"), random_qkv(30, batch=1)
    run = Run("dense", qkv, 30)
    run.piece(0, 30)
    score = method.score(run.layer, Call(qkv[0], 0.7))
    qkv[0][:, :, :26] = torch.randn(1, 4, 26, 8)
    assert torch.equal(method.score(run.layer, Call(qkv[0], 0.7)), score)


def test_an_even_kernel_and_an_empty_window_are_refused() -> None:
    for wrong in ({"kernel": 4}, {"window": 0}):
        with pytest.raises(LaconicError):
            get("snapkv", **wrong)
