"""The references and checks inside the benchmarks, against brute force."""

from __future__ import annotations

import pytest
import torch

from laconic.bench.child import run_child
from laconic.bench.llama_slice import build_slice, cache_bytes, fill, stock_cache, weight_bytes
from laconic.bench.steps import OurStep, Shape, StockStep
from laconic.bench.suite.column_sums import eager_column_sums
from laconic.bench.suite.prefill_methods import extrapolate
from laconic.bench.suite.tokenselect_decode import attention_mass
from laconic.errors import LaconicError


def test_eager_column_sums_equal_a_loop() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu_(1)
    found = eager_column_sums(query, keys, mask, 0.3)
    expected = torch.zeros(1, 4, 9)
    for head in range(4):
        for row in range(9):
            logits = 0.3 * keys[0, head // 2, : row + 1] @ query[0, head, row]
            expected[0, head, : row + 1] += logits.softmax(-1)
    torch.testing.assert_close(found, expected)


def test_stock_and_our_step_answer_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = Shape(70, heads=4, kv_heads=2, head_dim=16)
    keys, values = shape.filled(generator)
    incoming = shape.incoming(3, generator)
    stock, ours = StockStep(shape, keys, values, incoming), OurStep(shape, keys, values, incoming, "dense")
    for i in range(3):
        torch.testing.assert_close(ours(i), stock(i))
    assert ours.layer.n == stock.cache.get_seq_length() == 73
    torch.testing.assert_close(ours.layer.keys, stock.cache.layers[0].keys)
    assert ours.layer.keys[:, :, :70].numel() * 2 * 4 == shape.cache_bytes


def test_layers_in_the_same_memory_answer_like_one_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = Shape(70, heads=4, kv_heads=2, head_dim=16)
    keys, values = shape.filled(generator)
    incoming = shape.incoming(3, generator)
    one, three = (OurStep(shape, keys, values, incoming, "tokenselect(refresh=2):32", layers) for layers in (1, 3))
    for i in range(3):
        torch.testing.assert_close(three(i), one(i))
    assert [layer.n for layer in three.cache.layers] == [73] * 3
    assert three.cache.layers[2].keys.data_ptr() == three.layer.keys.data_ptr() and three.bytes_read == one.bytes_read


def test_attention_mass_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = Shape(60, heads=4, kv_heads=2, head_dim=16)
    keys, values = shape.filled(generator)
    incoming = shape.incoming(2, generator)
    step = OurStep(shape, keys, values, incoming, "tokenselect(refresh=2,sinks=2,recent=4):20")
    step(0), step(1)
    chosen = step.layer.slots["tokenselect"][0, 0]
    assert len(chosen) == 20
    masses = []
    for head in range(4):
        weights = (step.layer.keys[0, head // 2] @ incoming[1][0][0, head, 0] * shape.scale).softmax(-1)
        masses.append(float(weights[chosen].sum()))
    assert attention_mass(step, 1) == pytest.approx(sum(masses) / 4, rel=1e-5)


def test_slice_has_tied_weights_and_a_filled_cache_of_the_stated_size() -> None:
    model = build_slice(quick=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert weight_bytes(model) == 4 * sum(p.numel() for p in set(model.parameters()))
    caches = [stock_cache(model.config), stock_cache(model.config)]
    fill(model.config, 33, caches)
    held = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in caches[0].layers)
    assert held == cache_bytes(model.config, 33)
    assert torch.equal(caches[0].layers[3].keys, caches[1].layers[3].keys)
    assert caches[0].get_seq_length() == 33


def test_child_process_finds_this_laconic_and_reports_its_error() -> None:
    import laconic

    assert run_child("-c", "import laconic; print(laconic.__file__)").strip() == laconic.__file__
    with pytest.raises(LaconicError, match="ValueError: broken"):
        run_child("-c", "raise ValueError('broken')")


def test_two_lengths_tell_a_parabola() -> None:
    tables = [{"shape": {"tokens": n}, "ms": {"a": 3 * n + 0.5 * n * n, "b": 7.0 * n}} for n in (100, 300)]
    assert extrapolate(tables, 1000) == pytest.approx({"a": 3000 + 500_000, "b": 7000})
