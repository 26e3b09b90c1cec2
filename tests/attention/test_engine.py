"""The two identities that every sparse attention obeys, and the figures of the policy."""

from __future__ import annotations

import pytest
import torch
from attend import SCALE, Run, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError, Recipe, kernels
from laconic.attention.engine import Policy
from laconic.primitives.rest import compensate, others


def split(seed: int, n: int, k: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random tensors, k chosen slots per row and head, and the n - k others, ascending."""
    qkv = random_qkv(n, seed=seed)
    order = torch.rand(2, 2, n, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return qkv, order[..., :k].sort(-1).values, order[..., k:].sort(-1).values


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 60), st.floats(0.05, 0.95))
def test_dense_is_the_mixture_of_kept_and_rest(seed: int, n: int, share: float) -> None:
    """o_dense = (1 - d) o_sparse + d o_rest, with the dropped dense mass d."""
    k = min(n - 1, max(1, int(n * share)))
    (query, keys, values), chosen, rest = split(seed, n, k)
    last = query[:, :, -1]
    dense, dense_lse = kernels.decode_attention(last, keys, values, scale=SCALE)
    sparse, sparse_lse = kernels.selected_attention(last, keys, values, chosen, scale=SCALE)
    left, left_lse = kernels.selected_attention(last, keys, values, rest, scale=SCALE)
    d = (1 - (sparse_lse - dense_lse).exp())[..., None]
    torch.testing.assert_close(dense, (1 - d) * sparse + d * left, atol=1e-5, rtol=1e-5)
    merged, merged_lse = kernels.merge_attention([sparse, left], [sparse_lse, left_lse])
    torch.testing.assert_close(merged, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged_lse, dense_lse, atol=1e-5, rtol=1e-5)
    diameter = torch.cdist(values, values).amax((-1, -2)).repeat_interleave(2, dim=1)
    assert bool(((dense - sparse).norm(dim=-1) <= d[..., 0] * diameter + 1e-5).all())
    kept = torch.zeros(2, 2, n, dtype=torch.bool).scatter(-1, chosen, True)
    assert torch.equal(others(chosen, n), ~kept)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_a_mean_key_for_equal_keys_needs_log_n(seed: int, copies: int) -> None:
    query, keys, values = random_qkv(8 + copies, seed=seed)
    keys[:, :, 8:], values[:, :, 8:] = keys[:, :, 8:9].clone(), values[:, :, 8:9].clone()
    last = query[:, :, -1]
    dense, _ = kernels.decode_attention(last, keys, values, scale=SCALE)
    dropped = torch.arange(8 + copies).ge(8).expand(2, 2, -1)
    mean_key, mean_value, log_n = compensate(keys, values, dropped)
    few, few_lse = kernels.decode_attention(last, keys[:, :, :8], values[:, :, :8], scale=SCALE)
    one, one_lse = kernels.decode_attention(last, mean_key, mean_value, scale=SCALE)
    merged, _ = kernels.merge_attention([few, one], [few_lse, one_lse + log_n[..., 0].repeat_interleave(2, dim=1)])
    torch.testing.assert_close(merged, dense, atol=1e-5, rtol=1e-5)
    if copies > 1:  # without log N it is another number
        wrong, _ = kernels.merge_attention([few, one], [few_lse, one_lse])
        assert not torch.allclose(wrong, dense, atol=1e-5)


def test_nothing_dropped_is_minus_infinity() -> None:
    _, keys, values = random_qkv(5)
    _, _, log_n = compensate(keys, values, torch.zeros(2, 2, 5, dtype=torch.bool))
    assert bool((log_n == float("-inf")).all())


@pytest.mark.parametrize("recipe", ["streaming(sinks=1):6", "tokenselect(sinks=1, recent=1, refresh=2):6"])
def test_the_dropped_mass_is_that_of_the_newest_query(recipe: str) -> None:
    qkv = random_qkv(30)
    run = Run(recipe, qkv, 29, pads=(0, 4), measure=True)
    run.piece(0, 29)
    before = run.layer.positions.clone()
    run.piece(29, 30)
    evicts = "streaming" in recipe
    expected = []
    for row, pad in enumerate((0, 4)):
        for head in range(4):
            entries = [p + pad for p in before[row, head // 2].tolist() if p >= 0] + [29]
            logits = torch.stack([qkv[0][row, head, 29] @ qkv[1][row, head // 2, e] * SCALE for e in entries])
            p = dict(zip(entries, logits.softmax(0).tolist(), strict=True))
            if evicts:
                kept = {q + pad for q in run.layer.positions[row, head // 2].tolist() if q >= 0}
            else:
                kept = set(run.layer.slots["tokenselect"].expand(-1, 2, -1)[row, head // 2].tolist())
            expected.append(sum(v for e, v in p.items() if e not in kept))
    figures = run.layer.request.figures[0]
    assert figures["dropped_mass"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert figures["kept"] == 6


def test_two_readers_are_refused() -> None:
    for recipe in ("tokenselect:9 + recycled_attention:9", "tokenselect:9 + tokenselect:5"):
        with pytest.raises(LaconicError, match="both choose"):
            Policy(Recipe.parse(recipe).methods)


def test_evictors_work_in_order_and_each_sees_the_step() -> None:
    """The second evictor's sums count the step that the first one cuts."""
    qkv = random_qkv(40, batch=1)
    run = Run("knorm(sinks=0, recent=1):20 + h2o(recent_share=0):8", qkv, 30)
    for _ in run:
        assert run.layer.n == 8
        assert run.layer.tracks["h2o"].n == 8
        assert float(run.layer.tracks["h2o"].view().min()) > 0
    assert run.layer.seen == 40


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7])
def test_decode_prefill_and_softmax_by_hand_agree(softcap: float | None, window: int | None) -> None:
    qkv, pads = random_qkv(30), (0, 11)
    whole = Run("dense", qkv, 30, pads=pads, window=window, softcap=softcap).piece(0, 30)
    pieces = Run("dense", qkv, 13, pads=pads, window=window, softcap=softcap)
    split = torch.cat([out for _, out in pieces], dim=2)
    torch.testing.assert_close(whole, split, atol=1e-5, rtol=1e-5)
    for row, pad in enumerate(pads):
        for head in range(4):
            for at in range(pad, 30):
                first = pad if window is None else max(pad, at - window + 1)
                keys = qkv[1][row, head // 2, first : at + 1]
                logits = keys @ qkv[0][row, head, at] * SCALE
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                by_hand = logits.softmax(0) @ qkv[2][row, head // 2, first : at + 1]
                torch.testing.assert_close(whole[row, head, at], by_hand, atol=1e-5, rtol=1e-5)
    assert bool((whole[1, :, :11] == 0).all())  # rows of padding say nothing
