from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attend import SCALE, Run, random_qkv, top
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import generate, prompt, shared

import laconic
from laconic import LaconicError
from laconic.attention import actqkv, engine
from laconic.attention.actqkv import activation, entropy, update
from laconic.attention.rope import Rope
from laconic.cache import KVLayer, Request
from laconic.registry import get

ROPE = Rope(torch.tensor([0.9, 0.31, 0.11, 0.04]))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    original = engine.Policy._select

    def spy(self, layer, call):
        selection = original(self, layer, call)
        if selection is not None:
            seen.append(selection.indices)
        return selection

    monkeypatch.setattr(engine.Policy, "_select", spy)
    yield seen


# --- the probe -----------------------------------------------------------------------------------------------------
def fold(windows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, variance, seen = torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1, 1)
    for window in windows:
        mean, variance, seen = update(mean, variance, seen, window[None], torch.ones(1, len(window)))
    return mean, variance, seen


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 99))
def test_running_statistics_are_those_of_all_tokens(size: int, count: int, seed: int) -> None:
    everything = torch.randn(size * count, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    mean, variance, seen = fold(list(everything.split(size)))
    assert int(seen) == count
    torch.testing.assert_close(mean[0], everything.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(variance[0], everything.var(0), atol=1e-4, rtol=1e-4)


def test_padding_has_no_part_in_the_statistics() -> None:
    window = torch.randn(2, 6, 5)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).float()
    before = (torch.ones(2, 5), torch.ones(2, 5), torch.tensor([[0.0], [3.0]]))
    mean, variance, seen = update(*before, window, real)
    torch.testing.assert_close(mean[0], window[0, 2:].mean(0))
    torch.testing.assert_close(variance[0], window[0, 2:].var(0))
    assert torch.equal(mean[1], before[0][1]) and torch.equal(variance[1], before[1][1]) and seen.tolist() == [[1.0], [3.0]]
    weights = activation(window, real, mean, variance)
    assert weights[0, :2].tolist() == [0, 0] and abs(float(weights[0].sum()) - 1) < 1e-5


def test_equal_queries_weigh_the_same_and_outliers_more() -> None:
    same = torch.ones(8, 5)
    mean, variance, _ = fold([same, same])
    torch.testing.assert_close(activation(same[None], torch.ones(1, 8), mean, variance), torch.full((1, 8), 1 / 8))
    window = torch.randn(8, 5)
    window[3] += 10
    mean, variance, _ = fold([torch.randn(8, 5), window])
    weights = activation(window[None], torch.ones(1, 8), mean, variance)[0]
    assert int(weights.argmax()) == 3 and float(weights[3]) > 0.5
    order = torch.randperm(8)
    shuffled = activation(window[None, order], torch.ones(1, 8), mean, variance)[0]
    torch.testing.assert_close((shuffled[:, None] * window[order]).sum(0), (weights[:, None] * window).sum(0))


@pytest.mark.parametrize("weighted", [True, False])
def test_the_probe_finds_the_block_that_one_unusual_query_asks_for(
    reads: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    """One query of 32 points at block 5, the others are near their mean, which points at block 2: the mean finds that one."""
    if not weighted:
        monkeypatch.setattr(actqkv, "activation", lambda window, real, *_: real / real.sum(1, keepdim=True))
    query, keys, values = random_qkv(352, batch=1, heads=2, kv_heads=2, dim=16)
    direction, usual = torch.randn(2, 1, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    keys *= 0.1
    keys[:, :, 80:96], keys[:, :, 32:48] = direction, usual
    query[:] = usual + 0.05 * query
    query[:, :, 340:341] = 6 * direction
    run = Run("actqkv(block=16, sinks=0, recent=0):16", [query, keys, values], 352)
    for begin in range(0, 352, 32):
        run.piece(begin, begin + 32)
    chosen = set(reads[-1].flatten().tolist()) - set(range(320, 352))
    assert chosen == set(range(80, 96) if weighted else range(32, 48))
    assert set(reads[-2].flatten().tolist()) - set(range(288, 320)) == set(range(32, 48))


# --- blocks --------------------------------------------------------------------------------------------------------
def received(run: Run, row: int, head: int, pad: int, n: int, window: int) -> list[float]:
    """Attention that each token of the text got from the queries up to ``window`` tokens later, by hand."""
    total = [0.0] * n
    for at in range(n):
        low = max(0, at - window + 1)
        for h in (2 * head, 2 * head + 1):
            keys = run.keys[row, head, pad + low : pad + at + 1]
            for i, p in enumerate((keys @ run.query[row, h, pad + at] * SCALE).softmax(0).tolist()):
                total[low + i] += p
    return total


@pytest.mark.parametrize("pieces", [(48,), (10, 31, 48)])
@pytest.mark.parametrize("rope", [None, ROPE])
def test_blocks_are_read_by_the_cosine_of_their_best_attended_keys(
    reads: list[torch.Tensor], pieces: tuple[int, ...], rope: Rope | None
) -> None:
    size, recent, budget, pads = 4, 5, 22, (0, 7)
    run = Run(f"actqkv(block={size}, keys=2, recent={recent}, sinks=1):{budget}", random_qkv(60), 48, pads=pads, rope=rope)
    ends = (*pieces, *range(49, 61))
    for begin, end in zip((0, *ends), ends, strict=False):
        run.piece(begin, end)
        if begin < 48:
            continue
        for row, pad in enumerate(pads):
            n = end - pad
            done = (n - 1 - recent) // size
            flat = run.query[row, :, end - 1]
            if rope is not None:
                flat = rope.rotate(flat, torch.full((4,), recent - (n - 1)))
            worth = {}
            for block in range(done):
                parts = []
                for head in range(2):
                    got = received(run, row, head, pad, n - 1, recent)
                    inside = {s: got[s] for s in range(block * size, (block + 1) * size)}
                    best = torch.tensor(top(inside, 2))
                    keys = run.keys[row, head, pad + best]
                    parts.append((keys if rope is None else rope.rotate(keys, -best)).mean(0))
                vector = torch.stack([parts[0], parts[0], parts[1], parts[1]])
                worth[block] = float(torch.cosine_similarity(flat.flatten(), vector.flatten(), dim=0))
            order = [0, *range(n - recent, n), *range(done * size, n)]  # protected, and what is in no block yet
            for block in sorted(worth, key=lambda b: (-worth[b], b)):
                order += range(block * size, (block + 1) * size)
            expected = sorted(list(dict.fromkeys(order))[:budget])
            assert [s - pad for s in reads[-1][row, 0].tolist() if s >= 0] == expected
    assert len(reads) >= 12


def test_few_blocks_are_read_whole() -> None:
    qkv = random_qkv(40)
    for (_, a), (_, b) in zip(Run("actqkv(block=4, recent=8):40", qkv, 30), Run("dense", qkv, 30), strict=True):
        torch.testing.assert_close(a, b)


# --- the cut-off ---------------------------------------------------------------------------------------------------
def test_entropy_is_between_none_and_all_alike() -> None:
    count = torch.tensor([4, 2, 1])
    assert torch.allclose(entropy(torch.zeros(3, 4), count), torch.ones(3))
    sharp = entropy(torch.tensor([[50.0, 0, 0, 0], [0.0, 0, 99, 99], [0.0, 9, 9, 9]]), count)
    assert float(sharp[0]) < 1e-6 and torch.allclose(sharp[1:], torch.ones(2))


def cut(logits: list[torch.Tensor], share: float, least: int = 1, most: int = 10) -> list[int]:
    """Blocks that each layer gets in one step, with made-up scores of 20 blocks."""
    method = get("actqkv", share=share, least=least, block=4, recent=0, sinks=0, temperature=1.0, budget=str(4 * most))
    request, found = Request(), []
    layers = [KVLayer(i, len(logits), request) for i in range(len(logits))]
    for _ in range(3):  # entropies are known after the first step
        found = []
        for layer, scores in zip(layers, logits, strict=True):
            if not layer.n:
                request.positions = torch.arange(80)[None]
                layer.update(torch.randn(1, 1, 80, 8), torch.randn(1, 1, 80, 8))
            quota = method._cut(layer, scores[None], torch.tensor([20]), torch.tensor([4 * most]), torch.tensor([True]))
            found.append(int(quota) // 4)
    return found


def test_layers_with_more_spread_scores_get_more_blocks() -> None:
    flat, sharp = torch.zeros(20), torch.linspace(0, 12, 20)
    assert cut([flat] * 4, 0.5) == [5, 5, 5, 5]
    blocks = cut([flat, sharp, flat, sharp], 0.5)
    assert blocks[0] > blocks[1] and blocks[2] > blocks[3] and abs(sum(blocks) - 20) <= 2
    assert all(1 <= b <= 10 for b in blocks)
    assert min(cut([flat, 4 * sharp, flat, 4 * sharp], 0.5, least=3)) == 3
    assert cut([flat, flat], 1.0 - 1e-9) == [10, 10]


def test_the_cut_off_reads_its_share_of_the_budget() -> None:
    inputs = prompt(2, 150, pads=(0, 20))
    kept = {}
    for share in (1.0, 0.5):
        with laconic.apply(shared(), f"actqkv(block=4, recent=4, sinks=0, least=1, share={share}):64") as handle:
            generate(shared(), inputs, 8)
            kept[share] = handle.stats()["kept"]
    assert kept[1.0] == 64 and 30 <= kept[0.5] <= 40


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(LaconicError, match="share"):
        get("actqkv", share=1.5)
