"""8-bit keys: what they hold, how they grow, and votes on them."""

from __future__ import annotations

import pytest
import torch

from laconic import kernels
from laconic.errors import LaconicError
from laconic.kernels import cpu_index, reference
from laconic.kernels.index import KeyIndex


@pytest.fixture
def keys():
    return torch.randn(2, 2, 1100, 24, generator=torch.Generator().manual_seed(0))


def test_growing_gives_the_same_index(keys):
    at_once, grown = KeyIndex(keys), KeyIndex(keys[:, :, :5])
    for begin, end in ((5, 6), (6, 40), (40, 41), (41, 1100)):
        grown.append(keys[:, :, begin:end])
    assert at_once.n == grown.n == 1100
    assert torch.equal(at_once.keys(), grown.keys())
    step = keys.abs().amax(-1, keepdim=True) / 127
    assert bool(((at_once.keys() - keys).abs() <= 0.501 * step).all())


def test_keeping_some_is_the_index_of_those(keys):
    slots = torch.rand(2, 2, 1100, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :300].sort(-1).values
    index, kept = KeyIndex(keys), keys.gather(2, slots[..., None].expand(-1, -1, -1, 24))
    index.keep(slots)
    index.append(keys[:, :, :7])
    assert torch.equal(index.keys(), KeyIndex(torch.cat([kept, keys[:, :, :7]], 2)).keys()) and index.scales.shape[2] < 700


@pytest.mark.parametrize("over", ["layer", "group", "head"])
@pytest.mark.parametrize("heads", [2, 6, 12])
def test_vote_on_bytes(keys, over, heads):
    index = KeyIndex(keys)
    query = torch.randn(2, heads, 24, generator=torch.Generator().manual_seed(1))
    unit = query.abs().amax(-1, keepdim=True) / 127
    rounded = (query / unit).round() * unit  # the query is taken in bytes as well
    options = {"scale": 0.5, "starts": torch.tensor([[0, 3], [50, 1030]]), "stop": 1090, "over": over}
    expected = reference.vote(rounded, index.keys(), **options)
    torch.testing.assert_close(kernels.vote(query, keys, index=index, **options), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("over", ["layer", "group", "head"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_vote_on_bytes_on_the_gpu(keys, over, softcap):
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    from laconic.kernels import gpu

    index = KeyIndex(keys[:, :, :1095])
    index.append(keys[:, :, 1095:])
    query = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    for starts, stop in ((None, None), (torch.tensor([[0, 3], [50, 1030]]), 1090)):
        options = {"scale": 0.5, "starts": starts, "stop": stop, "over": over, "softcap": softcap}
        expected = reference.vote(query, index.keys(), **options)
        torch.testing.assert_close(gpu.index_vote(query, index, **options), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_logits_of_bytes_at_chosen_slots_on_the_gpu(keys, shared):
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    from laconic.kernels import gpu

    index = KeyIndex(keys[:, :, :1095])
    index.append(keys[:, :, 1095:])
    g = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 24, generator=g)
    slots = torch.rand(2, 1 if shared else 2, index.n, generator=g).argsort(-1)[..., :301].sort(-1).values
    slots[0, :, :3], slots[1, :, -1] = -1, index.n - 1
    got = gpu.index_logits(query, index, slots, scale=0.5)
    assert bool((got[0, :, :3] == -torch.inf).all()) and bool(got[1].isfinite().all())
    expected = reference.logits(query, index.keys(), scale=0.5, indices=slots)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_plain_loop_equals_the_instruction(keys, monkeypatch):
    query = torch.randn(2, 4, 24)
    index = KeyIndex(keys)
    fast = cpu_index.vote(query, index, scale=0.5)
    monkeypatch.setattr(cpu_index, "_tile", cpu_index._tile_plain)  # read when the copy below is compiled
    plain = cpu_index.nb.njit(cpu_index._vote_chunks.py_func)
    monkeypatch.setattr(cpu_index, "_vote_chunks", plain)
    torch.testing.assert_close(cpu_index.vote(query, index, scale=0.5), fast)


def test_chosen_tokens_keep_the_attention_mass():
    g = torch.Generator().manual_seed(0)
    keys, query = torch.randn(1, 8, 8192, 128, generator=g), torch.randn(1, 32, 128, generator=g)
    exact = kernels.vote(query, keys, scale=128**-0.5)
    rough = kernels.vote(query, keys, scale=128**-0.5, index=KeyIndex(keys))
    best = exact.gather(-1, kernels.topk(exact, 128)).sum()
    assert float(exact.gather(-1, kernels.topk(rough, 128)).sum() / best) > 0.99


def test_a_head_size_that_does_not_fit_is_refused():
    with pytest.raises(LaconicError, match="multiple of 4"):
        KeyIndex(torch.randn(1, 1, 3, 6))
