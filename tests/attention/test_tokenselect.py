from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attend import SCALE, Run, attention, held, random_qkv, top
from tiny import build, generate, prompt, shared

import laconic
from laconic import kernels
from laconic.attention import engine, tokenselect
from laconic.attention.rope import Rope
from laconic.cache import KVLayer, Request


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    original = engine.kernels.selected_attention
    monkeypatch.setattr(
        engine.kernels, "selected_attention", lambda *a, **k: (seen.append(a[3].clone()), original(*a, **k))[1]
    )
    yield seen


@pytest.fixture
def votes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    seen: list[int] = []
    original = kernels.vote
    monkeypatch.setattr(kernels, "vote", lambda *a, **k: (seen.append(1), original(*a, **k))[1])
    yield seen


def chosen_by_hand(
    run: Run, row: int, heads: range, at: int, pad: int, scale: float, kernel: int, sinks: int, recent: int, budget: int
) -> list[int]:
    """Slots: soft vote of the heads over the candidates, smoothed, best ones, and the protected ends."""
    candidates = list(range(pad + sinks, at + 1 - recent))
    total = dict.fromkeys(range(at + 1), 0.0)
    for head in heads:
        keys = run.keys[row, head // 2]
        logits = torch.stack([run.query[row, head, at] @ keys[c] * scale for c in candidates])
        for c, p in zip(candidates, logits.softmax(0).tolist(), strict=True):
            total[c] += p
    reach = kernel // 2
    smooth = {c: max(total.get(n, 0.0) for n in range(c - reach, c + reach + 1)) for c in candidates}
    return [*range(pad, pad + sinks), *top(smooth, budget - sinks - recent), *range(at + 1 - recent, at + 1)]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("scale", "kernel"), [(1.0, 1), (0.0, 1), (0.3, 3)])
def test_the_heads_vote(reads: list[torch.Tensor], per_head: bool, scale: float, kernel: int) -> None:
    sinks, recent, budget, pads = 2, 3, 10, (0, 7)
    recipe = (
        f"tokenselect(sinks={sinks}, recent={recent}, refresh=2, scale={scale}, kernel={kernel}, per_head={per_head})"
    )
    run = Run(f"{recipe}:{budget}", random_qkv(40), 28, pads=pads)
    for seen, output in run:
        if seen == 28:
            continue
        assert held(run)[0][0] == list(range(seen))  # nothing is forgotten
        for row, pad in enumerate(pads):
            for head in range(2):
                heads = range(2 * head, 2 * head + 2) if per_head else range(4)
                expected = chosen_by_hand(run, row, heads, seen - 1, pad, scale or SCALE, kernel, sinks, recent, budget)
                assert reads[-1].expand(-1, 2, -1)[row, head].tolist() == expected
                for h in (2 * head, 2 * head + 1):
                    by_hand = attention(run, row, h, seen - 1, expected)
                    torch.testing.assert_close(output[row, h, 0], by_hand, atol=1e-5, rtol=1e-5)


def test_the_vote_of_one_head_is_its_top_k(reads: list[torch.Tensor]) -> None:
    qkv = random_qkv(30, batch=1, heads=1, kv_heads=1)
    run = Run("tokenselect(sinks=0, recent=1, refresh=2):9", qkv, 29)
    run.piece(0, 29)
    run.piece(29, 30)
    logits = {s: float(qkv[0][0, 0, 29] @ qkv[1][0, 0, s]) for s in range(29)}
    assert reads[-1][0, 0].tolist() == [*top(logits, 8), 29]


def test_the_order_of_heads_does_not_matter(reads: list[torch.Tensor]) -> None:
    query, keys, values = random_qkv(40)
    order = torch.tensor([3, 2, 1, 0])
    for qkv in ([query, keys, values], [query[:, order], keys.flip(1), values.flip(1)]):
        for _ in Run("tokenselect(sinks=1, recent=2, refresh=0.5):8", qkv, 30):
            pass
    half = len(reads) // 2
    assert half == 10 and all(torch.equal(a, b) for a, b in zip(reads[:half], reads[half:], strict=True))


@pytest.mark.parametrize(("refresh", "expected"), [(1.5, 10), (-1.0, 1), (-2.0, 1)])
def test_how_often_the_heads_are_asked(votes: list[int], refresh: float, expected: int) -> None:
    for _ in Run(f"tokenselect(sinks=1, recent=2, refresh={refresh}):8", random_qkv(40), 30):
        pass
    assert len(votes) == expected


def test_a_choice_is_reused_while_the_query_points_the_same_way(votes: list[int], reads: list[torch.Tensor]) -> None:
    """Queries that turn by 10 degrees a step, gate at 25 degrees: asked at steps 0, 3, 6, 9."""
    query, keys, values = random_qkv(42, batch=1, heads=2, kv_heads=1, dim=2)
    angle = torch.deg2rad(10.0 * torch.arange(42))
    query[:] = torch.stack([angle.cos(), angle.sin()], dim=-1)
    run = Run(
        f"tokenselect(sinks=1, recent=2, refresh={float(torch.tensor(25.0).deg2rad().cos())}):8",
        [query, keys, values],
        32,
    )
    when, count = [], 0
    for seen, _ in run:
        if len(votes) > count:
            when.append(seen - 33)
            count = len(votes)
    assert when == [0, 3, 6, 9]
    for step in (1, 2):  # the old choice stays, the newest tokens are fresh, those in between are out of reach
        assert reads[step][0, 0, :-2].tolist() == reads[0][0, 0, :-2].tolist()
        assert reads[step][0, 0, -2:].tolist() == [32 + step - 1, 32 + step]


def test_after_a_new_piece_of_prompt_the_heads_are_asked_again(votes: list[int]) -> None:
    run = Run("tokenselect(sinks=1, recent=2, refresh=-1):8", random_qkv(40, batch=1), 30)
    for begin, end in ((0, 30), (30, 31), (31, 32), (32, 38), (38, 39), (39, 40)):
        run.piece(begin, end)
    assert len(votes) == 2


def test_the_fingerprint_is_free_of_position(votes: list[int]) -> None:
    """One and the same query before RoPE, at every position: its cosine is 1, so nobody is asked twice."""
    rope = Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]))
    query, keys, values = random_qkv(40, batch=1)
    query[:] = rope.rotate(query[:, :, :1].expand(-1, -1, 40, -1), torch.arange(40))
    for _ in Run("tokenselect(sinks=1, recent=2, refresh=0.999):8", [query, keys, values], 30, rope=rope):
        pass
    assert len(votes) == 1


# --- positions=compact -----------------------------------------------------------------------------------------------
def test_compact_positions_are_dense_when_all_is_selected() -> None:
    model, inputs = build(sharpen=2.0), prompt(2, 30, pads=(0, 8))
    options = {"return_dict_in_generate": True, "output_logits": True}
    with laconic.apply(model, "dense"):
        expected = generate(model, inputs, 8, **options)
    with laconic.apply(model, "tokenselect(sinks=1, recent=4, positions=compact):37"):
        ours = generate(model, inputs, 8, **options)
    assert torch.equal(ours.sequences, expected.sequences)
    for a, b in zip(ours.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_compact_positions_renumber_without_gaps() -> None:
    """By hand: keys before RoPE, rotated by their rank in the selection; the query stands right behind them."""
    rope = Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]))
    raw_query, raw_keys, values = random_qkv(40)
    pads = (0, 9)
    at = (torch.arange(40) - torch.tensor(pads)[:, None]).clamp(min=0)[:, None]
    qkv = [rope.rotate(raw_query, at), rope.rotate(raw_keys, at), values]
    run = Run("tokenselect(sinks=2, recent=3, refresh=2, positions=compact):10", qkv, 32, pads=pads, rope=rope)
    for seen, output in run:
        if seen == 32:
            continue
        slots = run.layer.slots["tokenselect"]
        for row, pad in enumerate(pads):
            chosen = slots[row, 0].tolist()
            assert len(chosen) == 10 and chosen[:2] == [pad, pad + 1] and chosen[-3:] == [seen - 3, seen - 2, seen - 1]
            rank = torch.arange(10)
            for head in range(4):
                keys = rope.rotate(raw_keys[row, head // 2, chosen], rank)
                query = rope.rotate(raw_query[row, head, seen - 1 : seen], rank[-1:])
                weights = (query @ keys.T * SCALE).softmax(-1)
                by_hand = (weights @ values[row, head // 2, chosen])[0]
                torch.testing.assert_close(output[row, head, 0], by_hand, atol=1e-4, rtol=1e-4)


def test_beyond_the_trained_length_no_rotation_is_larger_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = shared(), prompt(1, 90)
    largest: list[int] = []
    original = tokenselect.TokenSelect.select

    def spy(self: Any, layer: Any, call: Any) -> Any:
        selection = original(self, layer, call)
        if selection is not None:
            assert selection.key_positions.shape == selection.indices.shape
            largest.append(int(selection.key_positions.max()))
            newest = layer.lengths - 1 + selection.query_shift
            assert torch.equal(newest, selection.key_positions[:, 0, -1])  # the query stands at its own key
        return selection

    monkeypatch.setattr(tokenselect.TokenSelect, "select", spy)
    with laconic.apply(model, "tokenselect(sinks=2, recent=4, positions=compact):24"):
        generate(model, inputs, 6, prefill_chunk_size=8)
    assert len(largest) > 20 and max(largest) < 24 + 8  # the budget and, in the prompt, the chunk


# --- with others -----------------------------------------------------------------------------------------------------
def test_what_an_evictor_dropped_is_never_read(reads: list[torch.Tensor]) -> None:
    qkv = random_qkv(60, batch=1)
    run = Run("snapkv(window=4):20 + tokenselect(sinks=1, recent=2, refresh=2):8", qkv, 50)
    for seen, output in run:
        if seen == 50:
            kept = held(run)[0]
            continue
        for head in range(2):
            slots = reads[-1].expand(-1, 2, -1)[0, head].tolist()
            positions = run.layer.positions[0, head][slots].tolist()
            assert set(positions) <= {*kept[head], *range(50, seen)}
            for h in (2 * head, 2 * head + 1):
                by_hand = attention(run, 0, h, seen - 1, positions)
                torch.testing.assert_close(output[0, h, 0], by_hand, atol=1e-5, rtol=1e-5)


def test_int8_keys_read_fewer_bytes_and_choose_nearly_the_same() -> None:
    qkv = random_qkv(400, batch=1, dim=32)
    sizes, masses = [], []
    for int8 in (False, True):
        run = Run(f"tokenselect(sinks=1, recent=2, refresh=2, int8={int8}):64", qkv, 399, measure=True)
        run.piece(0, 399)
        run.piece(399, 400)
        figures = run.layer.request.figures[0]
        sizes.append(figures["bytes_read"])
        masses.append(1 - figures["dropped_mass"])
    assert sizes[1] < 0.6 * sizes[0]
    assert masses[1] > 0.99 * masses[0]


def test_raw_keys_are_the_keys_before_rope() -> None:
    rope = Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]))
    _, keys, values = random_qkv(50)
    layer = KVLayer(0, 1, Request())
    layer.rope = rope
    layer.update(rope.rotate(keys, torch.arange(50)), values)
    torch.testing.assert_close(layer.raw_keys, keys, atol=1e-5, rtol=1e-5)
