"""Blocks of keys against their definition, how they grow, and the bound of q.k that they give."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import kernels
from laconic.cache import KVLayer, Request
from laconic.errors import LaconicError
from laconic.kernels import cpu, reference
from laconic.kernels.blocks import KeyBlocks


@pytest.fixture(params=["cpu", "gpu"])
def fast(request):
    """The module of kernels to be compared with the reference."""
    if request.param == "cpu":
        return cpu
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    from laconic.kernels import gpu

    return gpu


def members(blocks: KeyBlocks, b: int, h: int) -> list[list[int]]:
    """The slots of each block, by hand."""
    start, origin = int(blocks.starts[b, h]), int(blocks.origins[b, h])
    found = [[s for s in range(max(start, at), blocks.n) if s < at + blocks.size] for at in range(origin, blocks.n, blocks.size)]
    return (found + [[]] * blocks.count)[: blocks.count]


def check(blocks: KeyBlocks, keys: torch.Tensor) -> None:
    """Every block holds what its own keys say, and nothing else."""
    assert blocks.n == keys.shape[2]
    for b, h in itertools.product(range(keys.shape[0]), range(keys.shape[1])):
        groups = members(blocks, b, h)
        assert int(blocks.counts[b, h]) == sum(bool(g) for g in groups)
        for j, slots in enumerate(groups):
            if blocks.kind == "mean":
                expected = keys[b, h, slots].float().mean(0) if slots else torch.zeros(keys.shape[3])
                torch.testing.assert_close(blocks.mean[b, h, j], expected, atol=1e-5, rtol=1e-5)
            elif slots:
                assert torch.equal(blocks.max[b, h, j], keys[b, h, slots].amax(0))
                assert torch.equal(blocks.min[b, h, j], keys[b, h, slots].amin(0))
            else:
                assert bool((blocks.max[b, h, j] == -torch.inf).all() and (blocks.min[b, h, j] == torch.inf).all())


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["bounds", "mean"]),
    st.integers(1, 7),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_blocks_grown_in_pieces_equal_their_definition(kind, size, pieces, starts, leads, dtype):
    n = sum(pieces)
    keys = torch.randn(2, 2, n + 3, 5, generator=torch.Generator().manual_seed(n)).to(dtype)[:, :, :n]
    starts = torch.tensor(starts).view(2, 2).clamp(max=n)
    lead = torch.tensor(leads).view(2, 2) % size
    for first, before in ((None, None), (starts, lead), (starts, None), (starts[:1, :1], None)):
        blocks, end = None, 0
        for piece in pieces:
            part, end = keys[:, :, end : end + piece], end + piece
            if blocks is None:
                blocks = KeyBlocks(part, size, kind=kind, starts=first, lead=before)
            else:
                blocks.append(part)
            check(blocks, keys[:, :, :end])
        at_once = KeyBlocks(keys, size, kind=kind, starts=first, lead=before)
        torch.testing.assert_close(at_once._view(kind), blocks._view(kind), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 2, 37, 16), (1, 8, 1, 1500, 64), (3, 3, 3, 5, 8), (1, 5, 1, 130, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits(fast, shape, dtype):
    batch, heads, kv_heads, n, dim = shape
    if fast is cpu and dtype not in cpu.DTYPES:
        pytest.skip("this processor has no instruction for float16")
    g = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, dim, generator=g).to(dtype)
    keys = torch.randn(batch, kv_heads, n + 13, dim, generator=g).to(dtype)[:, :, 2 : n + 2]
    some = torch.rand(batch, kv_heads, n, generator=g).argsort(-1)[..., : max(2, n // 3)]
    some[0, -1, 0] = -1
    for indices in (None, some, some[:, :1]):
        got = fast.logits(query, keys, scale=0.3, indices=indices)
        expected = reference.logits(query, keys, scale=0.3, indices=indices)
        assert got.shape == (batch, heads, n if indices is None else indices.shape[2]) and got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_no_key_exceeds_the_bound_of_its_block(fast, monkeypatch, heads, kv_heads, dtype, size):
    monkeypatch.setattr(kernels, "_implementation", lambda *tensors: fast)
    g = torch.Generator().manual_seed(size)
    keys = torch.randn(2, kv_heads, 75, 24, generator=g).to(dtype)
    query = torch.randn(2, heads, 24, generator=g).to(dtype)
    blocks = KeyBlocks(keys, size, starts=torch.tensor([[0], [29]]).expand(2, kv_heads))
    bounds = kernels.block_bounds(query, blocks)
    assert bounds.shape == (2, heads, blocks.count)
    products, group = reference.logits(query, keys), heads // kv_heads
    for b, h in itertools.product(range(2), range(heads)):
        for j, slots in enumerate(members(blocks, b, h // group)):
            if not slots:
                assert bounds[b, h, j] == -torch.inf
                continue
            best = products[b, h, slots].max()
            assert bounds[b, h, j] >= best - 1e-4
            if size == 1:  # a block of one key is bounded by its own product
                torch.testing.assert_close(bounds[b, h, j], best, atol=1e-4, rtol=1e-4)
            part = keys[b, h // group, slots].float()
            q = query[b, h].float()
            expected = torch.maximum(q * part.amax(0), q * part.amin(0)).sum()
            torch.testing.assert_close(bounds[b, h, j], expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.lists(st.integers(0, 20), min_size=2, max_size=2))
def test_slots_of_blocks_and_blocks_of_slots(size, n, starts):
    first = torch.tensor(starts).clamp(max=n - 1)[:, None]
    blocks = KeyBlocks(torch.randn(2, 1, n, 2), size, starts=first, lead=first % size)
    everything = torch.arange(blocks.count).expand(2, 1, -1)
    slots = blocks.slots(everything)
    for row in range(2):
        real = [s for s in slots[row, 0].tolist() if s >= 0]
        assert real == list(range(int(first[row]), n))
        assert slots[row, 0].tolist() == [-1] * (slots.shape[2] - len(real)) + real
        for j, group in enumerate(members(blocks, row, 0)):
            assert [s for s in blocks.slots(everything[:, :, j : j + 1])[row, 0].tolist() if s >= 0] == group
            assert blocks.of(torch.tensor(group, dtype=torch.int64).expand(2, 1, -1))[row, 0].tolist() == [j] * len(group)
    assert bool((blocks.slots(everything * 0 - 1) == -1).all())


def layer_of(keys: torch.Tensor, pads: tuple[int, ...], pieces: tuple[int, ...]) -> KVLayer:
    layer, end = KVLayer(0, 1, Request()), 0
    for piece in pieces:
        positions = torch.arange(end, end + piece)[None] - torch.tensor(pads)[:, None]
        layer.request.positions = positions.clamp(min=-1)
        layer.update(keys[:, :, end : end + piece], keys[:, :, end : end + piece])
        end += piece
    return layer


@pytest.mark.parametrize("kind", ["bounds", "mean"])
def test_a_layer_keeps_its_blocks_in_step(kind):
    keys = torch.randn(2, 2, 40, 6)
    layer = layer_of(keys, (0, 7), (20,))
    blocks, before = layer.key_blocks(4, kind), layer.bytes_kept
    assert layer.key_blocks(4, kind) is blocks and blocks.starts.tolist() == [[0, 0], [7, 7]]
    assert before == 2 * layer.keys.numel() * 4 + blocks.bytes
    layer.request.positions = torch.tensor([[20], [13]])
    layer.update(keys[:, :, 20:21], keys[:, :, 20:21])
    assert layer.key_blocks(4, kind) is blocks
    check(blocks, keys[:, :, :21])
    for change in (
        lambda: layer.keep(torch.tensor([0, 2, 3, 9, 12, 14, 15, 20]).expand(2, 2, -1)),
        lambda: layer.crop(-1),
        lambda: layer.reorder_cache(torch.tensor([1, 0])),
    ):
        change()
        fresh = layer.key_blocks(4, kind)
        assert fresh is not blocks
        check(fresh, layer.keys)
        blocks = fresh


def test_a_row_that_starts_later_is_not_mixed_with_its_padding():
    keys = torch.randn(2, 1, 22, 6)
    layer = layer_of(keys, (0, 13), (5,))  # nothing but padding in the second row yet
    assert layer.key_blocks(4).unsettled
    layer = layer_of(keys, (0, 13), (5, 17))
    assert layer.key_blocks(4).starts.tolist() == [[0], [13]]
    alone = layer_of(keys[1:, :, 13:], (0,), (9,)).key_blocks(4)
    assert torch.equal(alone.bounds[0], layer.key_blocks(4).bounds[1, :, :3])


def test_a_window_that_passed_keeps_the_borders():
    """Blocks lie at multiples of their size in the text, whatever was dropped in front."""
    keys = torch.randn(1, 1, 30, 6)
    layer = layer_of(keys, (0,), (30,))
    before = layer.key_blocks(4)
    layer.pass_window(14)  # slot 0 is now position 16
    after = layer.key_blocks(4)
    assert torch.equal(after.bounds, before.bounds[:, :, 4:])
    layer.pass_window(13)  # position 17: the first block has lost a key
    assert int(layer.key_blocks(4).origins) == -1
    check(layer.key_blocks(4), keys[:, :, 17:])


def test_what_is_not_held_is_refused():
    with pytest.raises(LaconicError, match="kind='mean'"):
        _ = KeyBlocks(torch.randn(1, 1, 3, 6), 2).mean
    with pytest.raises(LaconicError, match="cannot be made"):
        KeyBlocks(torch.randn(1, 1, 3, 6), 0)
