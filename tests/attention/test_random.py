from __future__ import annotations

import itertools

import pytest
import torch
from attend import Run, held, random_qkv

from laconic.primitives.scores import hashed_uniform


def kept_over_time(recipe: str, layer: int = 0, pads: tuple[int, ...] = (0, 6)) -> list[list[list[list[int]]]]:
    run = Run(recipe, random_qkv(60), 40, pads=pads, layer=layer, layers=2)
    return [held(run) for _ in run]


def test_the_same_seed_keeps_the_same_set_and_another_does_not() -> None:
    assert kept_over_time("random:24") == kept_over_time("random:24")
    assert kept_over_time("random:24") != kept_over_time("random(seed=1):24")
    assert kept_over_time("random:24") != kept_over_time("random:24", layer=1)


def test_heads_keep_different_sets() -> None:
    first, second = kept_over_time("random(sinks=0, recent=1):24")[0][0]
    assert first != second


def test_a_smaller_budget_keeps_a_subset_at_every_step() -> None:
    budgets = [kept_over_time(f"random(sinks=2, recent=3):{k}") for k in (8, 12, 20, 33)]
    for small, large in itertools.pairwise(budgets):
        for step, rows in enumerate(small):
            for row, heads in enumerate(rows):
                for head, kept in enumerate(heads):
                    assert set(kept) <= set(large[step][row][head])
                    assert len(kept) < len(large[step][row][head])


def test_padding_does_not_change_the_draw() -> None:
    padded = kept_over_time("random:24", pads=(0, 6))
    run = Run("random:24", [t[1:2, :, 6:] for t in random_qkv(60)], 34)
    for step, _ in enumerate(run):
        assert held(run)[0] == padded[step][1]


@pytest.mark.parametrize("seed", [0, 1, 2**40, -5])
def test_the_draw_is_uniform_over_positions(seed: int) -> None:
    numbers = hashed_uniform(torch.arange(20_000).expand(1, 2, -1), seed)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert torch.histc(numbers[0, 0], 10, 0, 1).sub(2000).abs().max() < 200  # 4.7 standard deviations
    for lag in (1, 2, 64):  # neighbours say nothing about each other, nor do heads
        pair = torch.stack([numbers[0, 0, lag:], numbers[0, 0, :-lag]])
        assert torch.corrcoef(pair)[0, 1].abs() < 0.04
    assert torch.corrcoef(numbers[0])[0, 1].abs() < 0.04
    assert numbers.unique().numel() > 39_000


def test_an_astronomic_seed_is_only_a_seed() -> None:
    assert kept_over_time(f"random(seed={10**30}):24")
