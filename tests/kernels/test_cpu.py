"""What only the CPU kernels do: number formats, views, uneven sizes, radix selection."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import kernels
from laconic.errors import LaconicError
from laconic.kernels import cpu, cpu_attention, cpu_common, reference
from laconic.kernels.memory import LINE, empty

DTYPES = list(cpu.DTYPES)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(found, expected, dtype):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def between(g, shape, dtype, order):
    """Random ``(batch, kv_heads, n, dim)`` with guard values around it, entry by entry or head by head in memory."""
    batch, heads, n, dim = shape
    if order == "heads":
        room = torch.full((batch, heads, n + 4, dim), float("nan"), dtype=dtype)
        view = room[:, :, 2 : n + 2]
    else:
        room = torch.full((batch, n + 4, heads + 1, dim), float("nan"), dtype=dtype)
        view = room[:, 2 : n + 2, :heads].transpose(1, 2)
    view.copy_(torch.randn(shape, generator=g))
    return view


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8), st.sampled_from([1, 2, 3]), st.integers(1, 300), st.sampled_from([4, 16, 24, 64, 80, 128]),
    st.sampled_from(DTYPES), st.sampled_from(["heads", "entries"]), st.sampled_from([None, 2.0]), st.integers(0, 9999),
)  # fmt: skip
def test_attention_in_any_view_reads_nothing_beyond_it(group, kv_heads, n, dim, dtype, order, softcap, seed):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, group * kv_heads, dim, generator=g).to(dtype)
    keys, values = (between(g, (2, kv_heads, n, dim), dtype, order) for _ in range(2))
    starts = torch.randint(0, n, (2, kv_heads), generator=g)
    options = {"scale": dim**-0.5, "softcap": softcap}
    found = cpu.decode_attention(query, keys, values, starts=starts, **options)
    close(found, reference.decode_attention(query, keys, values, starts=starts, **options), dtype)
    indices = torch.rand(2, kv_heads, n, generator=g).topk(max(1, n // 2)).indices.sort().values
    indices[1, :, 0] = -1
    found = cpu.selected_attention(query, keys, values, indices, **options)
    close(found, reference.selected_attention(query, keys, values, indices, **options), dtype)
    found = cpu.vote(query, keys, scale=dim**-0.5, starts=starts, stop=n, over="group")
    close([found], [reference.vote(query, keys, scale=dim**-0.5, starts=starts, stop=n, over="group")], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [0, 1 << 30])
def test_attention_is_the_same_in_one_call_and_in_blocks(monkeypatch, cached, dtype):
    monkeypatch.setattr(cpu_attention, "CACHED", cached)
    g = torch.Generator().manual_seed(2)
    query = torch.randn(2, 6, 40, generator=g, dtype=torch.float32).to(dtype)
    keys, values = between(g, (2, 2, 300, 40), dtype, "heads"), between(g, (2, 2, 300, 40), dtype, "entries")
    close(kernels.decode_attention(query, keys, values, scale=0.3),
          reference.decode_attention(query, keys, values, scale=0.3), dtype)  # fmt: skip


def test_entries_beyond_one_block_and_one_chunk():
    g = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 4, 16, generator=g), torch.randn(1, 2, 5003, 16, generator=g)
    indices = torch.arange(1, 5003, 2).expand(1, 1, -1)
    found = cpu.decode_attention(query, keys, keys, scale=1.0)
    close(found, reference.decode_attention(query, keys, keys, scale=1.0), torch.float32)
    found = cpu.selected_attention(query, keys, keys, indices, scale=1.0)
    close(found, reference.selected_attention(query, keys, keys, indices, scale=1.0), torch.float32)
    starts = torch.tensor([[1023, 2050]])
    for over in ("layer", "group"):
        options = {"scale": 1.0, "starts": starts, "stop": 4097, "over": over}
        close([cpu.vote(query, keys, **options)], [reference.vote(query, keys, **options)], torch.float32)


def test_an_entry_that_is_not_there_is_refused():
    keys = torch.randn(1, 1, 5, 16)
    with pytest.raises(LaconicError, match="entry 5 is not among the 5"):
        cpu.selected_attention(torch.randn(1, 1, 16), keys, keys, torch.tensor([[[0, 5]]]), scale=1.0)


def test_keys_that_are_not_numbers_show_in_the_output():
    keys = torch.randn(1, 1, 70, 16)
    keys[0, 0, 33, 3] = float("nan")
    output, _ = cpu.decode_attention(torch.randn(1, 4, 16), keys, keys, scale=1.0)
    assert bool(output.isnan().any())


def test_exponential_against_numpy():
    x = np.linspace(-100, 0, 20_001, dtype=np.float32)
    row = x.copy()
    total = cpu_common.soften(row, np.float32(0))
    expected = np.exp(x.astype(np.float64))
    normal = x > -87
    error = np.abs(row[normal] / expected[normal] - 1)
    assert bool((error < 3e-7 - 8e-8 * x[normal]).all())  # rounding of x weighs as much as x
    assert row[~normal].max() < 2e-38
    assert total == pytest.approx(expected.sum(), rel=1e-5)


FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf"), 1e-45, -1e-45])


@settings(max_examples=200, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=60), st.data())
def test_topk_against_sorting(numbers, data):
    k = data.draw(st.integers(1, len(numbers)))
    scores = torch.tensor([numbers, numbers[::-1]], dtype=torch.float32)[:, None]
    rounded = scores[0, 0].tolist()  # 1e-45 is no float32
    best = sorted(range(len(numbers)), key=lambda i: (-rounded[i], i))[:k]
    assert cpu.topk(scores, k)[0, 0].tolist() == sorted(best)
    assert torch.equal(cpu.topk(scores, k), reference.topk(scores, k))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0])
def test_topk_of_many(spread):
    scores = 1 + spread * torch.randn(2, 3, 20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cpu.topk(scores, 700), reference.topk(scores, 700))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
def test_column_sums_in_several_steps(monkeypatch, dtype, window):
    from laconic.kernels import cpu_scores

    monkeypatch.setattr(cpu_scores, "MAP_FLOATS", 1)  # eight rows at a time
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 50, 16, generator=g).to(dtype)
    keys = torch.randn(2, 2, 1200, 16, generator=g).to(dtype)
    starts = torch.tensor([[0, 0], [1170, 1000]])
    options = {"scale": 0.3, "starts": starts, "window": window}
    found, expected = cpu.column_sums(query, keys, **options), reference.column_sums(query, keys, **options)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kernels.column_sums(query, keys, **options), found)


def test_empty_is_aligned_and_of_the_shape_asked_for():
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        room = empty((2, 3, 5, 7), dtype)
        assert room.shape == (2, 3, 5, 7) and room.dtype == dtype and room.is_contiguous()
        assert room.data_ptr() % LINE == 0
    assert empty((2, 0, 4), torch.float32).numel() == 0


def test_compiling_works_where_nothing_can_be_written(monkeypatch):
    import numba

    real = numba.njit

    def njit(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(cpu_common.nb, "njit", njit)
    assert cpu_common.jit()(lambda x: x + 1)(2) == 3


def test_torch_keeps_its_number_of_threads():
    """In a fresh process, for it is numba's first start that could change it."""
    code = (
        "import torch; from laconic import kernels; "
        "kernels.vote(torch.randn(1, 4, 8), torch.randn(1, 2, 3000, 8), scale=1.0); print(torch.get_num_threads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"
