from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attend import Run, attention, random_qkv

from laconic import LaconicError
from laconic.attention import engine
from laconic.registry import get


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    original = engine.kernels.selected_attention
    monkeypatch.setattr(
        engine.kernels, "selected_attention", lambda *a, **k: (seen.append(a[3].clone()), original(*a, **k))[1]
    )
    yield seen


def by_hand(run: Run, row: int, head: int, seen: int, pad: int, page: int, how: str, budget: int, ends: tuple[int, int]):
    """Slots in order of protection and of the bound of their page, ties to the lowest."""
    worth = {}
    for slot in range(pad, seen):
        begin = pad + (slot - pad) // page * page
        keys = run.keys[row, head, begin : min(begin + page, seen)]
        bounds = [
            float(torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum())
            for q in run.query[row, 2 * head : 2 * head + 2, seen - 1]
        ]
        worth[slot] = {"max": max, "sum": sum, "mean": lambda b: sum(b) / 2}[how](bounds)
        if slot < pad + ends[0] or slot >= seen - ends[1]:
            worth[slot] = float("inf")
    return sorted(sorted(worth, key=lambda s: (-round(worth[s], 4), s))[:budget])


@pytest.mark.parametrize("how", ["max", "mean", "sum"])
@pytest.mark.parametrize(
    ("page", "budget", "ends"), [(4, 12, (0, 0)), (4, 14, (2, 3)), (3, 11, (5, 1)), (16, 9, (1, 2)), (1, 8, (0, 1))]
)
def test_pages_are_read_from_the_highest_bound_down(
    reads: list[torch.Tensor], how: str, page: int, budget: int, ends: tuple[int, int]
) -> None:
    pads = (0, 9)
    recipe = f"quest(page={page}, reduce={how}, sinks={ends[0]}, recent={ends[1]}):{budget}"
    run = Run(recipe, random_qkv(47), 36, pads=pads)
    for seen, output in run:
        if seen == 36:
            continue
        for row, pad in enumerate(pads):
            for head in range(2):
                slots = by_hand(run, row, head, seen, pad, page, how, budget, ends)
                assert reads[-1][row, head].tolist() == slots
                for h in (2 * head, 2 * head + 1):
                    expected = attention(run, row, h, seen - 1, slots)
                    torch.testing.assert_close(output[row, h, -1], expected, atol=1e-5, rtol=1e-5)
    assert len(reads) == 11


def test_a_window_hides_pages_and_parts_of_pages(reads: list[torch.Tensor]) -> None:
    run = Run("quest(page=4, sinks=1, recent=1):6", random_qkv(60), 40, pads=(0, 7), window=13)
    for seen, _ in run:
        if seen == 40:
            continue
        assert bool((reads[-1][..., -1] - reads[-1][..., 0] == 12).all())  # from the first that is visible to the newest


def test_the_page_of_a_needle_is_read_however_small_its_mean() -> None:
    """One key that points at the query among opposite ones: the mean of its page cancels, its bound does not."""
    query, keys, values = random_qkv(130, batch=1, heads=1, kv_heads=1, dim=16)
    keys *= 0.1
    keys[0, 0, 48:64] = -query[0, 0, -1]
    keys[0, 0, 55] = 3 * query[0, 0, -1]
    run = Run("quest(page=16, sinks=0, recent=0):16", [query, keys, values], 129)
    run.piece(0, 129)
    torch.testing.assert_close(run.piece(129, 130)[0, 0, 0], values[0, 0, 55], atol=1e-3, rtol=1e-3)


def test_the_first_layers_can_be_left_alone(reads: list[torch.Tensor]) -> None:
    for layer in (0, 1, 2):
        run = Run("quest(dense_layers=2, page=4):24", random_qkv(40), 36, layer=layer, layers=3)
        for _ in run:
            pass
        assert len(reads) == (4 if layer == 2 else 0)


def test_scoring_reads_two_keys_a_page() -> None:
    run = Run("quest(page=8):32", random_qkv(65, batch=1), 64)
    for _ in run:
        pass
    figures = run.layer.request.figures[0]
    row = 2 * 2 * 8 * 4  # two heads, keys and values of eight floats
    assert figures["bytes_read"] == 32 * row + 9 * row and figures["bytes_kept"] == 65 * row + 9 * row


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(LaconicError, match="reduce"):
        get("quest", reduce="median")
