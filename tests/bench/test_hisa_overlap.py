"""The sets that the overlap of HISA with a flat search is measured on, against sets of Python."""

from __future__ import annotations

import importlib.util
import itertools
import random
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.spec_from_file_location("hisa_overlap", Path(__file__).parents[2] / "benchmarks" / "hisa_overlap.py")
hisa_overlap = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hisa_overlap)


def test_overlap_and_its_ceiling_against_sets() -> None:
    rng, n, ends = random.Random(0), 45, (2, 3)
    for _ in range(20):
        first, second = (sorted(rng.sample(range(n), 12)) for _ in range(2))
        found, wanted = (hisa_overlap.marks(torch.tensor([[[-1, *slots]]]), n, ends) for slots in (first, second))
        a, b = ({slot for slot in slots if 2 <= slot < 42} for slots in (first, second))
        assert float(hisa_overlap.overlap(found, wanted)) == pytest.approx(len(a & b) / len(a | b))
        best = max(len({s for s in b if s // 8 in blocks}) for blocks in itertools.combinations(range(6), 2))
        assert float(hisa_overlap.ceiling(wanted, 8, 2)) == pytest.approx(best / (2 * len(b) - best))


def test_all_blocks_are_the_flat_search_and_fewer_are_below_their_ceiling() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [
        (torch.randn(1, 4, 300, 16, generator=generator), *(torch.randn(1, 2, 300, 16, generator=generator) for _ in range(2)))
        for _ in range(2)
    ]
    every, few = hisa_overlap.measure([layers], 5, ["hisa(block=8, oversample=6)", "hisa(block=8, oversample=1)"], steps=3)
    assert every["iou"] == every["above_99"] == every["iou_best_blocks"] == 1 and every["sets"] == 2 * 3 * 2
    assert every["mass"] == every["flat_mass"] <= 1
    assert few["iou"] < few["iou_best_blocks"] < 1 and few["mass"] < few["flat_mass"] and len(few["iou_layers"]) == 2
