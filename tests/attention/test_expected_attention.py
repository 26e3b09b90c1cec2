from __future__ import annotations

import pytest
import torch
from attend import SCALE, Run, held, random_qkv, top

import laconic
from laconic.attention.rope import Rope
from laconic.errors import LaconicError
from laconic.primitives.scores import expected_attention

ROPE = Rope(torch.tensor([1.0, 0.3, 0.1, 0.02]))


def test_the_closed_form_is_the_mean_over_many_queries() -> None:
    g = torch.Generator().manual_seed(0)
    keys, mean = torch.randn(1, 1, 12, 4, generator=g), 0.5 * torch.randn(1, 2, 4, generator=g)
    root = 0.5 * torch.randn(1, 2, 4, 4, generator=g)
    found = expected_attention(keys, mean, root @ root.transpose(-1, -2), scale=0.4)
    for head in range(2):
        draws = mean[0, head] + torch.randn(400_000, 4, generator=g) @ root[0, head].T
        weight = (0.4 * draws @ keys[0, 0].T).double().exp().mean(0)
        torch.testing.assert_close(found[0, head].double(), weight / weight.sum(), atol=2e-3, rtol=2e-2)


def test_the_kept_set_is_that_of_the_formula() -> None:
    sinks, recent, budget, future, pads = 2, 3, 10, 16, (0, 7)
    query, keys, values = qkv = random_qkv(40)
    run = Run(
        f"expected_attention(sinks={sinks}, recent={recent}, future={future}):{budget}", qkv, 40, pads=pads, rope=ROPE
    )
    run.piece(0, 40)
    for row, pad in enumerate(pads):
        n = 40 - pad
        for head in range(2):
            weights = []
            for h in (2 * head, 2 * head + 1):
                plain = torch.stack([ROPE.rotate(query[row, h, p + pad, None], torch.tensor([-p]))[0] for p in range(sinks, n)])
                mean, covariance = plain.mean(0), torch.cov(plain.T, correction=0)
                turns = [ROPE.rotate(torch.eye(8), torch.full((8,), n + t)) for t in range(future)]
                turn = torch.stack(turns).mean(0)
                mean, covariance = mean @ turn, turn.T @ covariance @ turn
                own = keys[row, head, pad:]
                weights.append((SCALE * own @ mean + SCALE**2 / 2 * ((own @ covariance) * own).sum(-1)).softmax(0))
            worth = (weights[0] + weights[1]) / 2 * values[row, head, pad:].norm(dim=-1)
            ends = {*range(sinks), *range(n - recent, n)}
            inner = {p: float(worth[p]) for p in range(n) if p not in ends}
            assert held(run)[row][head] == sorted(ends | set(top(inner, budget - len(ends))))


def test_pieces_of_a_prompt_add_up() -> None:
    qkv = random_qkv(50)
    whole, pieces = (Run("expected_attention(recent=4, future=8):50", qkv, 50, rope=ROPE) for _ in range(2))
    whole.piece(0, 50)
    for begin in (0, 20, 35):
        pieces.piece(begin, {0: 20, 20: 35, 35: 50}[begin])
    for i in range(3):
        name = f"expected_attention.{i}"
        torch.testing.assert_close(pieces.layer.memory[name], whole.layer.memory[name], atol=1e-4, rtol=1e-4)


def test_a_model_without_a_known_rotation_is_refused() -> None:
    from tiny import generate, prompt, shared

    with pytest.raises(LaconicError, match="rotary embedding is not understood"), laconic.apply(
        shared("gemma3"), "expected_attention:50%"
    ):
        generate(shared("gemma3"), prompt(), 2)
