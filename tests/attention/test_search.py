"""The chain of scores that finds what a step reads, and the method that exposes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attend import SCALE, Run, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import laconic
from laconic import LaconicError, kernels
from laconic.attention import engine
from laconic.kernels.index import KeyIndex

ENDS = "sinks=2, recent=3"


@pytest.fixture(autouse=True)
def pairs_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: {"rope": "half", "ranking": [[[2, 0, 1, 3]] * 2]})


def reads(recipe: str, qkv: list[torch.Tensor], pads: tuple[int, ...] = (), softcap: float | None = None) -> tuple[Any, int]:
    """The slots that the last token's step reads, per row and KV head, and the bytes read for choosing them."""
    seen, n = [], qkv[0].shape[2]
    with pytest.MonkeyPatch.context() as patch:
        original = engine.kernels.selected_attention
        patch.setattr(engine.kernels, "selected_attention", lambda *a, **k: (seen.append(a[3]), original(*a, **k))[1])
        run = Run(recipe, qkv, n - 1, pads=pads, softcap=softcap)
        run.piece(0, n - 1)
        run.piece(n - 1, n)
    slots = seen[-1].expand(-1, 2, -1)
    row = 2 * 4 * qkv[1].shape[-1]
    scored = run.layer.request.figures[0]["bytes_read"] - row * int((slots >= 0).sum())
    return [[[s for s in head if s >= 0] for head in rows] for rows in slots.tolist()], scored


SAME = [  # one chain, and the method that it is
    ("block=8, block_oversample=3, int8=false, exact=true", "hisa(block=8, oversample=3"),
    ("block=0, int8=true", "tokenselect(per_head=true, int8=true, scale=0, refresh=2"),
    ("block=0, int8=false, exact=true", "tokenselect(per_head=true, scale=0, refresh=2"),
    ("block=0, int8=false, pairs=2", "fasa(pairs=2"),
]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("pads", [(0, 0), (0, 17)])
@pytest.mark.parametrize(("chain", "method"), SAME)
def test_known_methods_are_settings_of_the_chain(chain: str, method: str, pads: tuple[int, int], softcap: float | None) -> None:
    if softcap and "fasa" in method:
        pytest.skip("its products of a few dimensions are not those that a model caps")
    qkv = random_qkv(90, seed=1)
    ours, theirs = (reads(f"{text}, {ENDS}):20", qkv, pads, softcap) for text in (f"coarse_to_fine({chain}", method))
    assert ours == theirs


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(30, 120), st.sampled_from([2, 5, 16]), st.booleans(), st.booleans())
def test_a_chain_that_loses_nothing_is_the_flat_choice(seed: int, n: int, block: int, int8: bool, pairs: bool) -> None:
    qkv = random_qkv(n, seed=seed)
    chain = f"block={block}, block_oversample=1000, int8={int8}, int8_oversample=1000, exact=true".lower()
    chain += ", pairs=2, pairs_oversample=1000" if pairs else ""
    ours, _ = reads(f"coarse_to_fine({chain}, {ENDS}):12", qkv)
    flat, _ = reads(f"coarse_to_fine(block=0, int8=false, exact=true, {ENDS}):12", qkv)
    assert ours == flat


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(1, 6), st.floats(1, 4))
def test_every_stage_scores_what_the_one_before_it_left(seed: int, block_over: float, int8_over: float) -> None:
    """By hand: the best blocks, of their tokens the best by 8-bit keys, of these the best by the keys."""
    n, budget, block = 80, 12, 4
    qkv = random_qkv(n, seed=seed)
    text = f"block={block}, block_oversample={block_over}, int8_oversample={int8_over}, exact=true"
    got, _ = reads(f"coarse_to_fine({text}, {ENDS}):{budget}", qkv)
    rough = KeyIndex(qkv[1]).keys()

    def times(over: float) -> int:
        return int(torch.tensor(budget) * over)  # in float32, as the chain counts: 2.9999999999999996 is 3

    for row in range(2):
        for head in range(2):
            query, keys = qkv[0][row, 2 * head : 2 * head + 2, n - 1], qkv[1][row, head]
            blocks = keys.view(-1, block, 8)
            bounds = torch.maximum(query[:, None] * blocks.amax(1), query[:, None] * blocks.amin(1)).sum(-1) * SCALE
            worth = bounds.softmax(-1).sum(0)
            count = max(-(-budget // block) + 4, times(block_over) // block)
            worth[[0, *range((n - 3) // block, n // block)]] = float("inf")  # of the first two and the newest three tokens
            chosen = worth.topk(min(count, len(worth))).indices.tolist()
            left = sorted(b * block + i for b in chosen for i in range(block))

            def best(left: list[int], held: torch.Tensor, count: int, query: torch.Tensor = query) -> list[int]:
                must = [s for s in left if s < 2 or s >= n - 3]
                free = [s for s in left if 2 <= s < n - 3]
                votes = (held[free] @ query.T * SCALE).softmax(0).sum(1)
                return sorted([*must, *(free[i] for i in votes.topk(min(count - len(must), len(free))).indices.tolist())])

            unit = query.abs().amax(-1, keepdim=True) / 127
            coarse = best(left, rough[row, head], times(int8_over), (query / unit).round() * unit)
            assert got[row][head] == best(coarse, keys, budget)


@pytest.mark.parametrize("pad", [9, 41])
@pytest.mark.parametrize(
    "recipe",
    [
        f"hisa(block=4, oversample=2, {ENDS}):20%",
        f"quest(page=4, {ENDS}):20%",
        f"fasa(pairs=2, {ENDS}):20%",
        f"coarse_to_fine(block=4, block_oversample=3, int8_oversample=1.5, pairs=3, exact=true, {ENDS}):20%",
    ],
)
def test_a_share_in_a_padded_row_is_that_of_the_row_alone(recipe: str, pad: int) -> None:
    """Rows of different lengths have different budgets, in every stage."""
    qkv = random_qkv(90, seed=2)
    together, _ = reads(recipe, qkv, (0, pad))
    alone, _ = reads(recipe, [part[1:, :, pad:] for part in qkv])
    assert [[slot - pad for slot in head] for head in together[1]] == alone[0]


def test_bytes_are_those_of_what_each_stage_scores() -> None:
    qkv = random_qkv(200)
    _, flat = reads(f"coarse_to_fine(block=0, int8=false, exact=true, {ENDS}):20", qkv)
    assert flat == 2 * 2 * 200 * 8 * 4
    _, int8 = reads(f"coarse_to_fine(block=0, {ENDS}):20", qkv)
    assert int8 == 2 * 2 * 200 * (8 + 4)  # a byte per dimension, and a scale
    _, few = reads(f"coarse_to_fine(block=0, int8=false, pairs=1, {ENDS}):20", qkv)
    assert few == 2 * 2 * 200 * 2 * 4
    _, blocks = reads(f"coarse_to_fine(block=10, int8=false, {ENDS}):20", qkv)
    assert blocks == 2 * 2 * 20 * 2 * 8 * 4
    _, two = reads(f"coarse_to_fine(block=10, block_oversample=3, int8=false, exact=true, {ENDS}):20", qkv)
    assert blocks < two <= blocks + 2 * 2 * (60 - 5) * 8 * 4  # the protected tokens are not scored


def test_8_bit_logits_of_chosen_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, query = torch.randn(2, 2, 70, 24, generator=generator), torch.randn(2, 6, 24, generator=generator)
    index = KeyIndex(keys)
    unit = query.abs().amax(-1, keepdim=True) / 127
    rounded = (query / unit).round() * unit
    for shared in (True, False):
        slots = torch.rand(2, 1 if shared else 2, 70, generator=generator).argsort(-1)[..., :23].sort(-1).values
        slots[1, 0, :4] = -1
        slots = slots.sort(-1).values
        got = kernels.logits(query, keys, scale=0.4, indices=slots, index=index)
        expected = kernels.reference.logits(rounded, index.keys(), scale=0.4, indices=slots)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    tiles = {(row, head, s // 16) for row in range(2) for head in range(2) for s in slots[row, head].tolist() if s >= 0}
    assert index.bytes_of(slots) == len(tiles) * 16 * (24 + 4)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("coarse_to_fine(block=0, int8=false)", "all stages are off"),
        ("coarse_to_fine(representative=max)", "representative must be one of"),
        ("coarse_to_fine(pairs=2, profile=no.json)", "no.json' is no file"),
    ],
)
def test_bad_input_is_one_sentence(recipe: str, sentence: str) -> None:
    with pytest.raises(LaconicError, match=sentence):
        laconic.Recipe.parse(recipe)
