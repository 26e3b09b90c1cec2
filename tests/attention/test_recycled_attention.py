from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attend import Run, attention, probabilities, random_qkv

from laconic.attention import engine

NAME = "recycled_attention"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    original = engine.kernels.selected_attention
    monkeypatch.setattr(
        engine.kernels, "selected_attention", lambda *a, **k: (seen.append(a[3].clone()), original(*a, **k))[1]
    )
    yield seen


def queue_by_hand(run: Run, row: int, head: int, at: int, pad: int, kernel: int, budget: int) -> list[int]:
    """Slots of the best entries, lowest first: largest probability over the group, max-pooled over neighbours."""
    slots = list(range(pad, at + 1))
    heads = [probabilities(run.query[row, h, at], run.keys[row, head], slots) for h in (2 * head, 2 * head + 1)]
    best = torch.maximum(*heads).tolist()
    reach = kernel // 2
    pooled = [max(best[max(0, i - reach) : i + reach + 1]) for i in range(len(best))]
    order = sorted(range(len(best)), key=lambda i: (-pooled[i], i))[:budget]
    return [slots[i] for i in sorted(order, key=lambda i: (pooled[i], i))]


@pytest.mark.parametrize("kernel", [1, 5])
def test_full_steps_rank_and_partial_steps_drop_the_lowest(reads: list[torch.Tensor], kernel: int) -> None:
    """The fixed schedule: full at every third step; in between the queue loses its front and gains the newest."""
    budget, every, pads, prompt = 9, 3, (0, 6), 24
    run = Run(f"{NAME}(every={every}, similarity=2, kernel={kernel}):{budget}", random_qkv(40), prompt, pads=pads)
    queue: dict[tuple[int, int], list[int]] = {}
    for seen, output in run:
        step = seen - prompt
        for row, pad in enumerate(pads):
            for head in range(2):
                if step and step % every:
                    queue[row, head] = [*queue[row, head][1:], seen - 1]
                    slots = sorted(queue[row, head])
                    assert reads[-1][row, head].tolist() == slots
                else:
                    slots = list(range(pad, seen))
                    queue[row, head] = queue_by_hand(run, row, head, seen - 1, pad, kernel, budget)
                assert run.layer.slots[NAME][row, head].tolist() == queue[row, head]
                for h in (2 * head, 2 * head + 1):
                    by_hand = attention(run, row, h, seen - 1, slots)
                    torch.testing.assert_close(output[row, h, -1], by_hand, atol=1e-5, rtol=1e-5)
    assert len(reads) == 11


@pytest.mark.parametrize("recipe", [f"{NAME}(every=1, similarity=2):6", f"{NAME}:60", f"{NAME}(every=3):45"])
def test_full_steps_only_or_a_budget_for_all_are_dense(recipe: str, reads: list[torch.Tensor]) -> None:
    qkv = random_qkv(45)
    for (_, a), (_, b) in zip(Run(recipe, qkv, 30, pads=(0, 8)), Run("dense", qkv, 30, pads=(0, 8)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert not reads


def test_the_gate_opens_when_the_query_turns(reads: list[torch.Tensor]) -> None:
    """Queries that turn by 10 degrees a step, looked at every second step, gate at 35 degrees: full at 4, 8, 12."""
    query, keys, values = random_qkv(34, batch=1, heads=2, kv_heads=1, dim=2)
    angle = torch.deg2rad(10.0 * torch.arange(34))
    query[:] = torch.stack([angle.cos(), angle.sin()], dim=-1)
    gate = float(torch.tensor(35.0).deg2rad().cos())
    run = Run(f"{NAME}(every=2, similarity={gate}):6", [query, keys, values], 20)
    full, before = [], 0
    for seen, _ in run:
        if seen > 20 and len(reads) == before:
            full.append(seen - 20)
        before = len(reads)
    assert full == [4, 8, 12]


def test_a_gate_that_never_opens_reads_a_window_in_the_end() -> None:
    run = Run(f"{NAME}(every=1, similarity=-2):5", random_qkv(40, batch=1), 20)
    for _ in run:
        pass
    assert run.layer.slots[NAME][0].tolist() == [[35, 36, 37, 38, 39]] * 2


def test_protected_tokens_survive_a_long_drought(reads: list[torch.Tensor]) -> None:
    run = Run(f"{NAME}(every=99, sinks=2, recent=3):8", random_qkv(60), 20, pads=(0, 5))
    for seen, _ in run:
        if seen > 20:
            for row, pad in enumerate((0, 5)):
                for slots in reads[-1][row].tolist():
                    assert {pad, pad + 1, seen - 3, seen - 2, seen - 1} <= set(slots) and len(set(slots)) == 8


def test_every_token_enters_the_cache_once() -> None:
    run = Run(f"{NAME}(every=4):6", random_qkv(40), 20)
    for seen, _ in run:
        assert run.layer.n == seen
        assert run.layer.positions[0, 0].tolist() == list(range(seen))
        assert torch.equal(run.layer.keys, run.keys[:, :, :seen])
