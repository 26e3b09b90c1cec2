"""Every implementation of a kernel against plain torch, and plain torch against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import kernels
from laconic.buffers import Buffer, kept
from laconic.errors import LaconicError
from laconic.kernels import cpu, reference
from laconic.kernels.ragged import Ragged

IMPLEMENTATIONS = ["cpu", "gpu"]
SHAPES = [  # batch, heads, kv_heads, n, head_dim
    (2, 4, 2, 37, 16),
    (1, 8, 1, 1500, 64),
    (3, 3, 3, 5, 8),
    (1, 5, 1, 130, 24),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def fast(request):
    """The module of kernels to be compared with the reference."""
    if request.param == "cpu":
        return cpu
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    from laconic.kernels import gpu

    return gpu


def tensors(shape, dtype=torch.float32, seed=0):
    """Query, keys, values as views into larger buffers, and first visible slots."""
    batch, heads, kv_heads, n, dim = shape
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, dim, generator=g).to(dtype)
    keys = torch.randn(batch, kv_heads, n + 13, dim, generator=g).to(dtype)[:, :, :n]
    values = torch.randn(batch, kv_heads, n + 5, dim, generator=g).to(dtype)[:, :, 2 : n + 2]
    starts = torch.randint(0, max(1, n // 2), (batch, kv_heads), generator=g)
    return query, keys, values, starts


def close(a, b, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_decode_attention(fast, shape, dtype, softcap):
    query, keys, values, starts = tensors(shape, dtype)
    for first in (None, starts):
        options = {"scale": 0.2, "starts": first, "softcap": softcap}
        close(
            fast.decode_attention(query, keys, values, **options),
            reference.decode_attention(query, keys, values, **options),
            dtype,
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
def test_selected_attention(fast, shape, shared):
    query, keys, values, _ = tensors(shape)
    batch, _, kv_heads, n, _ = shape
    scores = torch.rand(batch, 1 if shared else kv_heads, n)
    indices = scores.topk(max(2, n // 3)).indices.sort().values
    indices[0, 0, 0] = -1
    options = {"scale": 0.2}
    close(
        fast.selected_attention(query, keys, values, indices, **options),
        reference.selected_attention(query, keys, values, indices, **options),
        torch.float32,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("over", ["layer", "group"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_vote(fast, shape, over, softcap):
    query, keys, _, starts = tensors(shape)
    n = shape[3]
    for first in (None, starts):
        for stop in (None, n - 1):
            options = {"scale": 1.0, "starts": first, "stop": stop, "over": over, "softcap": softcap}
            close([fast.vote(query, keys, **options)], [reference.vote(query, keys, **options)], torch.float32)


def test_selecting_everything_is_dense():
    query, keys, values, _ = tensors(SHAPES[0])
    everything = torch.arange(keys.shape[2]).expand(keys.shape[0], 1, -1)
    close(
        kernels.selected_attention(query, keys, values, everything, scale=0.3),
        kernels.decode_attention(query, keys, values, scale=0.3),
        torch.float32,
    )


def test_nothing_visible_gives_zero_and_minus_infinity():
    query, keys, values, _ = tensors(SHAPES[0])
    nothing = torch.full((keys.shape[0], 1, 4), -1)
    output, lse = kernels.selected_attention(query, keys, values, nothing, scale=0.3)
    assert output.abs().max() == 0
    assert bool((lse == -torch.inf).all())


def test_decode_attention_is_softmax_attention():
    query, keys, values, starts = tensors((2, 4, 2, 19, 8))
    output, lse = reference.decode_attention(query, keys, values, scale=0.5, starts=starts)
    for b in range(2):
        for h in range(4):
            first = starts[b, h // 2]
            logits = keys[b, h // 2, first:] @ query[b, h] * 0.5
            torch.testing.assert_close(output[b, h], logits.softmax(0) @ values[b, h // 2, first:])
            torch.testing.assert_close(lse[b, h], logits.logsumexp(0))


def test_vote_is_a_sum_of_probabilities():
    query, keys, _, _ = tensors(SHAPES[0])
    votes = kernels.vote(query, keys, scale=0.7, stop=20)
    torch.testing.assert_close(votes.sum(-1), torch.full((2, 1), 4.0))
    assert votes[..., 20:].abs().max() == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_topk_takes_the_lowest_index_among_equals(numbers, data):
    k = data.draw(st.integers(1, len(numbers)))
    best = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:k]
    scores = torch.tensor(numbers, dtype=torch.float32)[None, None]
    assert kernels.topk(scores, k)[0, 0].tolist() == sorted(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_argmax_is_the_lowest_of_equal_ones(dtype):
    scores = torch.randint(-3, 3, (4, 3, 50), generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[0, 0] = float("-inf")
    lowest = torch.where(scores == scores.amax(-1, keepdim=True), torch.arange(50), 50).amin(-1)
    assert torch.equal(kernels.argmax(scores), lowest)
    assert torch.equal(kernels.argmax(scores.transpose(0, 1)), lowest.T)  # no view needs to be contiguous
    assert kernels.argmax(scores[0, 1]).shape == ()


def test_topk_with_infinities_and_refusals():
    scores = torch.tensor([[[1.0, torch.inf, -torch.inf, torch.inf]]])
    assert kernels.topk(scores, 3)[0, 0].tolist() == [0, 1, 3]
    with pytest.raises(LaconicError, match="NaN"):
        kernels.topk(scores * float("nan"), 1)
    with pytest.raises(LaconicError, match="cannot be chosen"):
        kernels.topk(scores, 5)


@pytest.mark.parametrize("rows", [1, 7, 30])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_column_sums_against_the_map(fast, rows, window, padded, softcap):
    g = torch.Generator().manual_seed(1)
    n, query, keys = 30, torch.randn(2, 4, rows, 8, generator=g), torch.randn(2, 2, 30, 8, generator=g)
    starts = torch.tensor([[0, 0], [6, 6]]) if padded else None
    expected = torch.zeros(2, 4, n)
    for b in range(2):
        for h in range(4):
            for r in range(rows):
                at = n - rows + r
                first = max(int(starts[b, h // 2]) if padded else 0, at - window + 1 if window else 0)
                if first <= at and (not padded or at >= starts[b, h // 2]):
                    logits = keys[b, h // 2, first : at + 1] @ query[b, h, r] * 0.4
                    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                    expected[b, h, first : at + 1] += logits.softmax(0)
    options = {"scale": 0.4, "starts": starts, "window": window, "softcap": softcap}
    torch.testing.assert_close(fast.column_sums(query, keys, **options), expected, atol=1e-5, rtol=1e-5)
    blocked = reference.column_sums(query, keys, **options, rows=4)
    torch.testing.assert_close(blocked, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "window"), [(150, None), (150, 70), (65, 70), (150, 3)])
def test_column_sums_over_several_tiles(fast, rows, window):
    g = torch.Generator().manual_seed(2)
    query, keys = torch.randn(1, 4, rows, 20, generator=g), torch.randn(1, 2, 180, 20, generator=g)[:, :, :150]
    options = {"scale": 0.5, "starts": torch.tensor([[9, 70]]), "window": window}
    expected = reference.column_sums(query, keys, **options)
    torch.testing.assert_close(fast.column_sums(query, keys, **options), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 18))
def test_merging_parts_is_attention_over_the_whole(seed, cut):
    query, keys, values, _ = tensors((1, 4, 2, 19, 8), seed=seed)
    parts = [
        kernels.decode_attention(query, keys[:, :, part], values[:, :, part], scale=0.5)
        for part in (slice(0, cut), slice(cut, 19))
    ]
    merged = kernels.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    close(merged, kernels.decode_attention(query, keys, values, scale=0.5), torch.float32)


def test_large_logits_stay_finite():
    query, keys, values, _ = tensors(SHAPES[0])
    output, lse = cpu.decode_attention(query * 1000, keys, values, scale=1.0)
    expected, lse_expected = reference.decode_attention(query * 1000, keys, values, scale=1.0)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, lse_expected)


def ragged_of(tensor, starts):
    """A tensor's entries from ``starts`` on, as a cache stores them."""
    return kept(Buffer(tensor), torch.where((slot := torch.arange(tensor.shape[2])) >= starts[..., None], slot, -1), True).view()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_of_different_lengths(fast, shape, dtype):
    """Every kernel gives the same for heads that are stored one after the other as for a whole tensor, in either module."""
    query, keys, values, starts = tensors(shape, dtype)
    batch, _, kv_heads, n, _ = shape
    slot = torch.arange(n)
    keys, values = (t.masked_fill((slot < starts[..., None])[..., None], 0) for t in (keys, values))
    ragged = [ragged_of(t, starts) for t in (keys, values)]
    assert torch.equal(ragged[0].padded(), keys) and torch.equal(ragged[1][:, :, n // 3 :], values[:, :, n // 3 :])
    assert ragged[0].numel() == int((n - starts).sum()) * keys.shape[-1] and ragged[0].shape == keys.shape
    later = (starts + torch.randint(0, 3, starts.shape)).clamp(max=n - 1)
    chosen = torch.stack([torch.stack([slot[s:][:: max(1, (n - s) // 4)][:4] for s in row.tolist()]) for row in starts]) \
        if n > 30 else (n - 1 - torch.zeros(batch, kv_heads, 1, dtype=torch.int64))
    outside = torch.cat([torch.where(starts > 0, 0, -1)[..., None], chosen], -1)  # slot 0 is not there wherever starts > 0
    expected = torch.where(outside < starts[..., None], -1, outside)
    for first in (None, later):
        options = {"scale": 0.2, "starts": first}
        whole = {"scale": 0.2, "starts": starts if first is None else later}
        for module in (fast, reference):
            got = module.decode_attention(query, *ragged, **options)
            close(got, reference.decode_attention(query, keys, values, **whole), dtype)
            for over in ("layer", "group", "head"):
                got = module.vote(query, ragged[0], stop=n - 1, over=over, **options)
                close([got], [reference.vote(query, keys, stop=n - 1, over=over, **whole)], dtype)
            got = module.column_sums(query[:, :, None], ragged[0], **options)
            close([got], [reference.column_sums(query[:, :, None], keys, **whole)], dtype)
    for module in (fast, reference):
        got = module.selected_attention(query, *ragged, outside, scale=0.2)
        close(got, reference.selected_attention(query, keys, values, expected, scale=0.2), dtype)
        close([module.logits(query, ragged[0])], [reference.logits(query, keys)], dtype)
        got = module.logits(query, ragged[0], indices=chosen)
        close([got], [reference.logits(query, keys, indices=chosen)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_gaps_close_in_place(dtype, shared):
    g = torch.Generator().manual_seed(0)
    for dims in ((), (6,)):
        whole = (torch.randn(2, 3, 40, *dims, generator=g) * 100).to(dtype)
        slots = (torch.rand(2, 1 if shared else 3, 29, generator=g).argsort(-1)[..., :25]).sort(-1).values
        slots[0, 0, :3] = -1
        expected = whole.clone()
        for b, h, j in itertools.product(range(2), range(3), range(25)):
            slot = int(slots[b, 0 if shared else h, j])
            if slot >= 0:
                expected[b, h, j] = whole[b, h, slot]
        for module in (kernels, reference):
            moved = torch.cat([whole.clone(), whole], 2)[:, :, :40]  # a view with strides of its own
            module.compact(moved, slots)
            assert torch.equal(moved[:, :, :25], expected[:, :, :25])
            if not dims:
                continue
            starts = torch.tensor([[3, 0, 7], [0, 39, 2]])
            ragged = ragged_of(whole, starts)
            inside = torch.where(slots >= starts[..., None], slots, -1).expand(2, 3, -1)
            inside = inside.sort(-1).values
            fewer = (inside < 0).sum(-1)
            module.compact(ragged, inside, ragged.bases + starts - fewer)
            got = Ragged(ragged.data, ragged.bases + starts - fewer, fewer, 25).padded()
            take = whole.gather(2, inside.clamp(min=0)[..., None].expand(-1, -1, -1, 6))
            assert torch.equal(got, take.masked_fill((inside < 0)[..., None], 0))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("shared", [True, False])
def test_column_sums_in_a_window_of_positions(fast, rows, shared):
    """Tokens between the entries are gone: the window counts these too."""
    g = torch.Generator().manual_seed(3)
    n, window, query, keys = 20, 8, torch.randn(2, 4, rows, 8, generator=g), torch.randn(2, 2, 20, 8, generator=g)
    positions = torch.rand(2, 1 if shared else 2, 50, generator=g).argsort(-1)[..., :n].sort(-1).values
    positions[1, :, :3], starts = -1, torch.tensor([[0, 0], [3, 3]])
    expected = torch.zeros(2, 4, n)
    for b, h, r in itertools.product(range(2), range(4), range(n - rows, n)):
        at = positions[b, 0 if shared else h // 2]
        seen = [s for s in range(r + 1) if at[s] > at[r] - window and at[s] >= 0]
        expected[b, h, seen] += (keys[b, h // 2, seen] @ query[b, h, r - n + rows] * 0.4).softmax(0)
    options = {"scale": 0.4, "starts": starts, "window": window, "positions": positions}
    torch.testing.assert_close(fast.column_sums(query, keys, **options), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference.column_sums(query, keys, **options, rows=4), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [3, 90, 400])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_column_sums_in_a_window_of_positions_over_several_tiles(fast, window, softcap):
    g = torch.Generator().manual_seed(4)
    query, keys = torch.randn(2, 4, 170, 20, generator=g), torch.randn(2, 2, 220, 20, generator=g)[:, :, :200]
    positions = torch.rand(2, 2, 500, generator=g).argsort(-1)[..., :200].sort(-1).values
    options = {"scale": 0.5, "starts": torch.tensor([[9, 70], [0, 0]]), "window": window, "softcap": softcap}
    expected = reference.column_sums(query, keys, **options, positions=positions)
    assert not torch.allclose(expected, reference.column_sums(query, keys, **options))
    got = fast.column_sums(query, keys, **options, positions=positions)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
