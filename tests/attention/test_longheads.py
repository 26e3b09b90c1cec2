from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from attend import SCALE, Run, random_qkv, top

import laconic
from laconic import LaconicError
from laconic.attention import engine
from laconic.attention.rope import Rope
from laconic.registry import get
from laconic.selection import Selection

ROPE = Rope(torch.tensor([0.9, 0.31, 0.11, 0.04]))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Selection, torch.Tensor]]]:
    """Every selection that was read, with the query it was read by."""
    seen: list[tuple[Selection, torch.Tensor]] = []
    original = engine.Policy._select

    def spy(self, layer, call):
        selection = original(self, layer, call)
        if selection is not None:
            seen.append((selection, call.query))
        return selection

    monkeypatch.setattr(engine.Policy, "_select", spy)
    yield seen


def rotated(qkv: list[torch.Tensor], pads: tuple[int, ...]) -> list[torch.Tensor]:
    """Queries and keys with their positions in them."""
    at = (torch.arange(qkv[0].shape[2])[None] - torch.tensor(pads)[:, None]).clamp(min=0)[:, None]
    return [ROPE.rotate(qkv[0], at), ROPE.rotate(qkv[1], at), qkv[2]]


def chunk_key(qkv: list[torch.Tensor], row: int, head: int, begin: int, size: int) -> torch.Tensor:
    """By the definition, token by token, from queries and keys without positions (``rotated`` adds those in the chunk)."""
    query, keys, values = (t[row, h, begin : begin + size] for t, h in zip(qkv, (head, head // 2, head // 2), strict=True))
    at = torch.arange(size)
    query, keys = ROPE.rotate(query, at), ROPE.rotate(keys, at)
    answers = [(torch.stack([q @ k * SCALE for k in keys]).softmax(0)[:, None] * values).sum(0) for q in query]
    mean = sum(answers) / size
    return (torch.stack([mean @ k * SCALE for k in keys]).softmax(0)[:, None] * keys).sum(0)


@pytest.mark.parametrize("pieces", [(40,), (13, 21, 40)])
@pytest.mark.parametrize("how", ["max", "mean"])
def test_chunks_are_read_by_the_score_of_their_keys(reads: list, how: str, pieces: tuple[int, ...]) -> None:
    size, count, pads = 4, 6, (0, 5)
    plain = random_qkv(54)
    recipe = f"longheads(chunk={size}, reduce={how}, sinks=0, recent=1):{count * size}"
    run = Run(recipe, rotated(plain, pads), 40, pads=pads, rope=ROPE)
    for begin, end in itertools.pairwise((0, *pieces)):
        run.piece(begin, end)
    for begin in range(40, 54):
        reads.clear()
        run.piece(begin, begin + 1)
        _check(reads[-1][0].indices, plain, begin + 1, pads, size, count, how)


def _check(slots: torch.Tensor, plain: list[torch.Tensor], seen: int, pads: tuple[int, ...], size: int, count: int, how: str):
    for row, pad in enumerate(pads):
        n = seen - pad
        chunks, rest, current = -(-n // size), n % size, (n - 1) // size
        for head in range(2):
            worth = {}
            for c in range(1, current - 1):
                keys = [chunk_key(plain, row, h, pad + c * size, size) for h in (2 * head, 2 * head + 1)]
                scores = [float(plain[0][row, 2 * head + g, seen - 1] @ k) for g, k in enumerate(keys)]
                worth[c] = max(scores) if how == "max" else sum(scores) / 2
            whole = {0, current - 1, current}
            best = top(worth, count - len(whole))
            expected = [s for c in sorted({*whole, *best}) for s in range(c * size, min((c + 1) * size, n))]
            got = [s - pad for s in slots[row, head].tolist() if s >= 0]
            assert got == expected, (row, head, seen)
            assert len(got) == (count - 1) * size + (rest or size) and chunks > count


def test_heads_choose_for_themselves(reads: list) -> None:
    query, keys, values = random_qkv(65, batch=1, heads=2, kv_heads=2)
    keys *= 0.1
    for head, begin in ((0, 16), (1, 40)):
        keys[0, head, begin : begin + 8] = 2 * query[0, head, -1]
    run = Run("longheads(chunk=8, sinks=0, recent=0):32", [query, keys, values], 64)
    for _ in run:
        pass
    first, second = reads[-1][0].indices[0].tolist()
    assert set(range(16, 24)) <= set(first) and not set(range(16, 24)) & set(second)
    assert set(range(40, 48)) <= set(second) and not set(range(40, 48)) & set(first)


def test_compact_positions_stay_within_the_budget(reads: list) -> None:
    size, count, pads = 4, 6, (0, 9)
    recipe = f"longheads(chunk={size}, positions=compact, sinks=0, recent=1):{count * size}"
    run = Run(recipe, rotated(random_qkv(90), pads), 60, pads=pads, rope=ROPE)
    for begin, end in ((0, 20), (20, 24), (24, 32), (32, 60), *((i, i + 1) for i in range(60, 90))):
        run.piece(begin, end)
        if not reads:
            continue
        selection, query = reads[-1]
        kept = (selection.indices >= 0).sum(-1)
        assert int(selection.key_positions.max()) < count * size + (0 if query.shape[2] == 1 else query.shape[2])
        for row, pad in enumerate(pads):
            for head in range(2):
                at = selection.key_positions[row, head][selection.indices[row, head] >= 0]
                assert at.tolist() == list(range(int(kept[row, head])))
            moved = end - pad - 1 + int(selection.query_shift[row])
            assert moved == int(kept[row, 0]) - 1  # the query stands at the last of them
    assert len(reads) > 30


def test_compact_attention_by_hand() -> None:
    """Output of a step: the chosen keys without positions, rotated by their rank, the query by the last one."""
    plain = random_qkv(41, batch=1)
    run = Run("longheads(chunk=4, positions=compact, sinks=0, recent=1):16", rotated(plain, (0,)), 40, rope=ROPE)
    run.piece(0, 40)
    output = run.piece(40, 41)
    choice = Run("longheads(chunk=4, sinks=0, recent=1):16", rotated(plain, (0,)), 40, rope=ROPE)
    choice.piece(0, 40)
    slots = get("longheads", chunk=4, sinks=0, recent=1, budget="16")
    positions = torch.arange(40, 41)
    choice.layer.request.positions = positions[None]
    choice.layer.update(choice.keys[:, :, 40:41], choice.values[:, :, 40:41])
    chosen = slots.select(choice.layer, laconic.attention.base.Call(choice.query[:, :, 40:41], SCALE)).indices[0]
    for head in range(4):
        own = chosen[head // 2]
        keys = ROPE.rotate(plain[1][0, head // 2, own], torch.arange(len(own)))
        query = ROPE.rotate(plain[0][0, head, 40:41], torch.tensor([len(own) - 1]))[0]
        weights = (keys @ query * SCALE).softmax(0)
        torch.testing.assert_close(output[0, head, 0], weights @ plain[2][0, head // 2, own], atol=1e-5, rtol=1e-5)


def test_below_the_budget_it_is_dense(reads: list) -> None:
    qkv = random_qkv(30)
    for (_, a), (_, b) in zip(Run("longheads(chunk=4):32", qkv, 20), Run("dense", qkv, 20), strict=True):
        torch.testing.assert_close(a, b)
    assert not reads


def test_the_mean_stands_in_where_queries_are_gone() -> None:
    """After a crop the queries of begun chunks are not there any more; complete ones too lose their keys."""
    plain = random_qkv(60, batch=1)
    run = Run("longheads(chunk=4, sinks=0, recent=1):24", rotated(plain, (0,)), 40, rope=ROPE)
    run.piece(0, 40)
    run.layer.crop(-3)
    for begin in range(37, 41):
        run.piece(begin, begin + 1)
    found = run.layer.memory["longheads.keys"]
    assert found.shape[2] == 10
    local = ROPE.rotate(plain[1][0, :, :40].unflatten(1, (10, 4)), torch.arange(4).expand(2, 10, 4)).mean(2)
    torch.testing.assert_close(found[0, :, :9], local[:, :9].repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


def test_whole_chunks_never_leave_too_little_for_protected_tokens(reads: list) -> None:
    run = Run("longheads(chunk=7, sinks=4, recent=16):21", random_qkv(60, batch=1), 40)
    for seen, _ in run:
        if seen > 40:
            slots = reads[-1][0].indices
            assert slots.shape[2] in (20, 21) and {*range(4), *range(seen - 16, seen)} <= set(slots[0, 0].tolist())


def test_rows_may_change_places() -> None:
    """As beams do: what was kept of each row goes along, queries of the open chunk included."""
    outputs = []
    for order in ([0, 1], [1, 0]):
        qkv = [t[order] for t in random_qkv(60)]
        run = Run("longheads(chunk=4, sinks=0, recent=1):16", qkv, 38)
        run.piece(0, 38)
        if order == [1, 0]:
            run.layer.reorder_cache(torch.tensor([1, 0]))
            run.query, run.keys, run.values = (t[order] for t in qkv)
        outputs.append([run.piece(begin, begin + 1) for begin in range(38, 60)])
    torch.testing.assert_close(outputs[0], outputs[1])


def test_what_cannot_work_is_refused() -> None:
    for wrong in ({"positions": "far"}, {"reduce": "median"}):
        with pytest.raises(LaconicError):
            get("longheads", **wrong)
    with pytest.raises(LaconicError, match="rotary"):
        Run("longheads(positions=compact, chunk=4):16", random_qkv(40), 30).piece(0, 30)
