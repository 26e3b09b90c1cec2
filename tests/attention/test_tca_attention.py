"""TCA-Attention against its definition: which tokens of a block stay, how many, and what the prompt's later tokens see."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from attend import SCALE, Run, attention, held, random_qkv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import prompt, shared

import laconic
from laconic import LaconicError
from laconic.attention import tca_stream
from laconic.attention.tca_attention import TCAAttention
from laconic.attention.tca_stream import configurations, distributions, effective_count, ranked_counts, sizes
from laconic.primitives.allocate import largest_remainder
from laconic.profiles import make_profile

QUARTER, HALF, WHOLE = [-2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]  # every block keeps a quarter, half, or all of its tokens


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The first head needs half of its tokens, the second a quarter."""
    tables = {"configurations": [QUARTER, HALF, WHOLE], "mass": [[[0.7, 0.96, 1.0], [0.97, 0.98, 1.0]]]}
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: tables)
    return tables


def kept_by_hand(run: Run, row: int, head: int, n: int, keep: int, block: int, recent: int, sinks: int, queries: int) -> list:
    """Positions that one KV head holds after ``n`` tokens: ``keep`` of each block that has left the window."""
    pad = int(run.pads[row])
    stays = list(range(min(sinks, n)))
    number = 0
    while (number + 1) * block + recent <= n:
        due, begin = (number + 1) * block + recent, number * block
        tokens = [t for t in range(begin, begin + block) if t >= sinks]
        newest = range(max(due - queries, begin + block - 1), due)
        query = run.query[row, 2 * head : 2 * head + 2, [pad + t for t in newest]].flatten(0, 1)
        weights = (query @ run.keys[row, head, [pad + t for t in tokens]].T * SCALE).softmax(-1).mean(0)
        best = weights.argsort(descending=True, stable=True)[: min(keep, len(tokens))].tolist()
        stays += sorted(tokens[i] for i in best)
        number += 1
    return stays + [t for t in range(number * block, n) if t >= sinks]


@pytest.mark.usefixtures("profile")
@pytest.mark.parametrize("pads", [(0, 0), (0, 13)])
def test_each_head_keeps_its_share_of_every_block(pads: tuple[int, int]) -> None:
    run = Run("tca_attention(block=8, recent=6, sinks=2, queries=5)", random_qkv(75, seed=3), 60, pads=pads)
    for seen, _ in run:
        for row, pad in enumerate(pads):
            for head, keep in ((0, 4), (1, 2)):
                assert held(run)[row][head] == kept_by_hand(run, row, head, seen - pad, keep, 8, 6, 2, 5), (seen, row, head)
    assert run.layer.keys.numel() == int((run.layer.positions >= 0).sum()) * 8


@pytest.mark.parametrize("window", [None, 60])
def test_a_less_redundant_block_keeps_more(profile: dict[str, Any], window: int | None) -> None:
    """Its place among the blocks before it says how many of the configuration's counts are left for it."""
    profile["configurations"][1] = profile["configurations"][0] = [-1.0, 1.0]
    run = Run("tca_attention(block=8, recent=6, sinks=0, queries=5)", random_qkv(150, batch=1, seed=2), 150, window=window)
    run.piece(0, 150)
    shares = distributions([[-1.0, 1.0]], 8)
    for head in range(2):
        spread: list[float] = []
        stays: list[int] = []
        for number in range((150 - 6) // 8):
            due, begin = number * 8 + 14, number * 8
            queries, keys = run.query[0, 2 * head : 2 * head + 2, due - 5 : due], run.keys[0, head, begin : begin + 8]
            weights = (queries @ keys.T * SCALE).softmax(-1).flatten(0, 1).mean(0)
            spread.append(float(effective_count(weights)))
            low = 0 if window is None else math.ceil(max(0, due - window) / 8)  # blocks that are whole in the window
            larger = sum(other >= spread[-1] for other in spread[low:-1])
            counts = ranked_counts(shares, torch.tensor([number + 1 - low]), torch.tensor([[[larger]]]), 8)
            best = weights.argsort(descending=True, stable=True)[: int(counts)]
            stays += sorted((begin + best).tolist())
        first = 0 if window is None else 150 - window
        assert held(run)[0][head] == [t for t in [*stays, *range(144, 150)] if t >= first]


@pytest.mark.usefixtures("profile")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("rows", [256, 24])
def test_later_tokens_see_what_stayed_and_the_error_is_bounded_by_the_dropped_mass(
    monkeypatch: pytest.MonkeyPatch, rows: int, window: int | None
) -> None:
    """Row by row, whether or not blocks of rows end where blocks of tokens leave the window."""
    qkv, n = random_qkv(84, batch=1, seed=5), 84
    monkeypatch.setattr(tca_stream, "ROWS", rows)
    monkeypatch.setattr(tca_stream, "BLOCKS", 3)
    run = Run("tca_attention(block=8, recent=6, sinks=2, queries=5)", qkv, n, window=window)
    output = run.piece(0, n)
    dense = Run("dense", qkv, n, window=window).piece(0, n)
    longest, pairs = qkv[2].norm(dim=-1).amax(), 0
    for head, row in itertools.product(range(4), range(n)):
        low = 0 if window is None else max(0, row + 1 - window)
        seen = [*kept_by_hand(run, 0, head // 2, row, (4, 2)[head // 2], 8, 6, 2, 5), row]
        seen = [t for t in seen if t >= low]
        pairs += len(seen)
        torch.testing.assert_close(output[0, head, row], attention(run, 0, head, row, seen), atol=1e-5, rtol=1e-5)
        weights = (qkv[1][0, head // 2, low : row + 1] @ qkv[0][0, head, row] * SCALE).softmax(0)
        lost = 1 - float(weights[[t - low for t in seen]].sum())
        assert float((output[0, head, row] - dense[0, head, row]).norm()) <= 2 * lost * float(longest) + 1e-5
    visible = sum(row + 1 - (0 if window is None else max(0, row + 1 - window)) for row in range(n))
    weighed = 9 * 8 * 5 - 2 * 5  # by five queries, each token of the blocks that have left the window, but for the sinks
    share = pairs / 4 / visible + weighed / (n * (n + 1) / 2)
    assert run.layer.request.figures[0]["pairs"] == pytest.approx(share)


@pytest.mark.usefixtures("profile")
@pytest.mark.parametrize("budget", ["", ":44"])
@pytest.mark.parametrize("window", [None, 40])
def test_a_prompt_in_pieces_loses_the_same(budget: str, window: int | None) -> None:
    recipe, qkv, pads = f"tca_attention(block=4, recent=6, sinks=2, queries=5){budget}", random_qkv(120, seed=7), (0, 13)
    whole = Run(recipe, qkv, 120, pads=pads, window=window)
    output = whole.piece(0, 120)
    pieces = Run(recipe, qkv, 120, pads=pads, window=window)
    parts = [pieces.piece(begin, end) for begin, end in itertools.pairwise([0, 35, 36, 37, 70, 119, 120])]
    low = [0 if window is None else 120 - pad - window for pad in pads]  # older entries go with the next block
    assert [[[p for p in head if p >= at] for head in row] for row, at in zip(held(pieces), low, strict=True)] == [
        [[p for p in head if p >= at] for head in row] for row, at in zip(held(whole), low, strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 2), output, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 64), st.integers(1, 50), st.floats(-6, 0), st.floats(0.0, 3.0))
@example(block=2, blocks=3, mu=-3.0, sigma=0.25)  # one size takes all, and the other has a weight below rounding
def test_counts_follow_the_configuration(block: int, blocks: int, mu: float, sigma: float) -> None:
    shares = distributions([[mu, sigma]], block)
    counts = ranked_counts(shares, torch.tensor([blocks]), torch.arange(blocks).expand(1, 1, -1), block)[0, 0]
    assert counts.tolist() == sorted(counts.tolist(), reverse=True) and set(counts.tolist()) <= set(sizes(block).tolist())
    for size, share in zip(sizes(block).tolist(), shares[0].tolist(), strict=True):
        if sizes(block).tolist().count(size) == 1:
            assert abs(int((counts == size).sum()) - share * blocks) < 1 + 1e-6  # up to rounding
    assert math.isclose(float(shares.sum()), 1.0, abs_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 20)), min_size=1, max_size=8), st.integers(0, 100))
def test_apportioning_is_whole_capped_and_in_proportion(places: list[tuple[float, int]], total: int) -> None:
    weights, caps = (torch.tensor(column) for column in zip(*places, strict=True))
    got = largest_remainder(weights.double(), torch.tensor(total), caps)
    assert int(got.sum()) == min(total, int(caps.sum())) and bool((got <= caps).all()) and bool((got >= 0).all())
    free = [(float(w), int(g)) for w, g, c in zip(weights, got, caps, strict=True) if g < c and w > 1e-3]
    for (w1, g1), (w2, g2) in itertools.pairwise(free):
        assert (g1 + 1) / w1 >= (g2 - 1) / w2 - 1e-6 and (g2 + 1) / w2 >= (g1 - 1) / w1 - 1e-6


@pytest.mark.usefixtures("profile")
@pytest.mark.parametrize("budget", [40, 60])
def test_a_budget_is_the_total_in_the_heads_proportions(budget: int) -> None:
    run = Run(f"tca_attention(block=4, recent=4, sinks=2):{budget}", random_qkv(220, seed=1), 200)
    for _ in run:
        counts = (run.layer.positions >= 0).sum(-1)
        assert bool((counts.sum(-1) <= 2 * budget).all()) and bool((counts.sum(-1) >= 2 * (budget - 8)).all())
        assert bool((counts[:, 0] > 1.5 * counts[:, 1]).all())


@pytest.mark.usefixtures("profile")
def test_more_tau_is_no_fewer_tokens(profile: dict[str, Any]) -> None:
    run = Run("dense", random_qkv(10), 10)
    run.piece(0, 10)
    kept = [TCAAttention(tau=tau)._plan(run.layer).density.sum() for tau in (0.0, 0.7, 0.9, 0.97, 1.0)]
    assert kept == sorted(kept) and float(kept[0]) == 0.5 and float(kept[-1]) == 2.0


def test_the_last_configuration_keeps_everything_and_entropy_counts_tokens() -> None:
    shares = distributions(configurations(16), 16)
    density = shares @ sizes(16).double() / 16
    assert float(density[-1]) == pytest.approx(1.0) and float(density.min()) < 0.1 and len(density) == 31
    assert effective_count(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])).tolist() == pytest.approx([4.0, 1.0])


def test_calibration_on_a_model_is_repeatable_and_retains_more_with_more() -> None:
    texts = [prompt(1, 150, seed=i)["input_ids"][0] for i in range(2)]
    made, again = (make_profile("tca_attention", shared(), texts, seed=0) for _ in range(2))
    assert made == again
    mass = torch.tensor(made.tables["mass"])
    assert mass.shape == (2, 2, 31) and bool((mass[..., -1] == 1).all()) and bool((mass <= 1 + 1e-5).all())
    assert bool((mass[..., 1] < mass[..., -1]).all())


@pytest.mark.usefixtures("profile")
@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("tca_attention(probe=window)", "probe must be one of after, last"),
        ("tca_attention(redundancy=none)", "redundancy must be one of"),
        ("tca_attention(tau=2)", "tau is a share"),
        ("tca_attention:pyramid:10%", "without 'pyramid:'"),
        ("tca_attention(profile=no.json)", "laconic profile tca_attention --model MODEL"),
        ("tca_attention:20", "cannot hold the 4 first and 16 newest tokens and an unfinished block of 16"),
        ("tca_attention + dhsa(borders=fixed)", "both compute a part of the prompt"),
    ],
)
def test_bad_input_is_one_sentence(recipe: str, sentence: str) -> None:
    with pytest.raises(LaconicError, match=sentence):
        run = Run(recipe, random_qkv(100), 100)
        run.piece(0, 100)


def test_a_model_without_a_profile_is_told_how_to_make_one() -> None:
    sentence = "laconic profile tca_attention --model MODEL"
    with pytest.raises(LaconicError, match=sentence), laconic.apply(shared(), "tca_attention:64"):
        shared()(**prompt(1, 100))
