from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import vlm
from attend import SCALE, Run, held, random_qkv, record, top, turn_by
from tiny import build, prompt

import laconic
from laconic.attention.rope import Rope
from laconic.errors import LaconicError
from laconic.primitives.scores import expected_attention

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rows (n, head_dim) and by how many positions each

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


def kept(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, turn: Turn, *, sinks: int, recent: int, budget: int,
    future: int, scale: float,
) -> list[int]:  # fmt: skip
    """What one KV head keeps of a text by the formula: queries ``(group, n, d)``, keys and values ``(n, d)``, by position."""
    n, dim = keys.shape
    weights = []
    for own in queries:
        plain = turn(own[sinks:], -torch.arange(sinks, n))
        mean, covariance = plain.mean(0), torch.cov(plain.T, correction=0)
        ahead = torch.stack([turn(torch.eye(dim), torch.full((dim,), n + t)) for t in range(future)]).mean(0)
        mean, covariance = mean @ ahead, ahead.T @ covariance @ ahead
        weights.append((scale * keys @ mean + scale**2 / 2 * ((keys @ covariance) * keys).sum(-1)).softmax(0))
    worth = torch.stack(weights).mean(0) * values.norm(dim=-1)
    ends = {*range(sinks), *range(n - recent, n)}
    inner = {p: float(worth[p]) for p in range(n) if p not in ends}
    return sorted(ends | set(top(inner, budget - len(ends))))


def test_the_kept_set_is_that_of_the_formula() -> None:
    sinks, recent, budget, future, pads = 2, 3, 10, 16, (0, 7)
    query, keys, values = qkv = random_qkv(40)
    run = Run(
        f"expected_attention(sinks={sinks}, recent={recent}, future={future}):{budget}", qkv, 40, pads=pads, rope=ROPE
    )
    run.piece(0, 40)
    for row, pad in enumerate(pads):
        for head in range(2):
            by_hand = kept(
                query[row, 2 * head : 2 * head + 2, pad:], keys[row, head, pad:], values[row, head, pad:], ROPE.rotate,
                sinks=sinks, recent=recent, budget=budget, future=future, scale=SCALE,
            )  # fmt: skip
            assert held(run)[row][head] == by_hand


def test_every_layer_turns_queries_by_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local and a global layer of one model, whose frequencies differ, by hand; by the other's table the choice is another."""
    model = build("gemma3", sharpen=2.0, sliding_window=64)  # wider than the text
    calls, x = record(monkeypatch), prompt(1, 40)["input_ids"]
    options = {"sinks": 2, "recent": 3, "budget": 10, "future": 16}
    with laconic.apply(model, "expected_attention(sinks=2, recent=3, future=16):10"), torch.no_grad():
        model(x)
    others = []
    for index, seen in enumerate(calls):
        for head in range(2):
            own = (seen.call.query[0, 2 * head : 2 * head + 2], seen.keys[0, head], seen.values[0, head])
            chosen = [
                kept(*own, lambda rows, at, i=i: turn_by(model, i, rows, at), **options, scale=seen.call.scale)
                for i in (index, 1 - index)
            ]
            assert seen.layer.positions[0, head].tolist() == chosen[0]
            others.append(chosen[1] != chosen[0])
    assert len(others) == 4 and any(others)


def test_pieces_of_a_prompt_add_up() -> None:
    qkv = random_qkv(50)
    whole, pieces = (Run("expected_attention(recent=4, future=8):50", qkv, 50, rope=ROPE) for _ in range(2))
    whole.piece(0, 50)
    for begin in (0, 20, 35):
        pieces.piece(begin, {0: 20, 20: 35, 35: 50}[begin])
    for i in range(3):
        name = f"expected_attention.{i}"
        torch.testing.assert_close(pieces.layer.memory[name], whole.layer.memory[name], atol=1e-4, rtol=1e-4)


def test_a_model_whose_keys_cannot_be_turned_is_refused() -> None:
    model, x = vlm.build("qwen2_vl"), vlm.inputs("qwen2_vl", (1,))
    with laconic.apply(model, "expected_attention:50%"), pytest.raises(LaconicError, match="or take another method"):
        model(**x)
