"""The references and checks inside the benchmarks, against brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laconic.attention.base import Call
from laconic.bench.child import run_child
from laconic.bench.llama_slice import build_slice, cache_bytes, fill, stock_cache, weight_bytes
from laconic.bench.steps import OurStep, Shape, StockStep
from laconic.bench.suite import scoring_pareto
from laconic.bench.suite.column_sums import eager_column_sums
from laconic.bench.suite.prefill_methods import extrapolate
from laconic.bench.suite.tokenselect_decode import attention_mass
from laconic.cache import KVCache
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


def test_recall_equals_a_loop(tmp_path: Path) -> None:
    case = scoring_pareto.made_up_case(300, tmp_path, heads=4, kv_heads=2, dim=16, steps=2)
    ((query, keys, values),) = case.texts[0]
    cache = KVCache(1)
    cache.layers[0].update(keys, values)
    best = scoring_pareto.best_attention(cache.layers[0], Call(query[:, :, -1:], 0.25), 30)
    slots = torch.tensor([[[-1, 3, 70, 299], [0, 1, 2, 5]]])
    shares = []
    for head in range(2):
        total = sum((keys[0, head] @ query[0, h, -1] * 0.25).softmax(0) for h in (2 * head, 2 * head + 1))
        mine = sum(float(total[s]) for s in slots[0, head].tolist() if s >= 0)
        shares.append(mine / float(total.sort(descending=True).values[:30].sum()))
    assert scoring_pareto.recall(slots, *best) == pytest.approx(sum(shares) / 2, rel=1e-4)


def test_a_search_is_beaten_by_as_much_for_less() -> None:
    known = {"known": "quest", "recall": 0.8, "bytes": 100, "recipe": "quest"}
    points = {"more_for_more": (0.9, 101), "less_for_less": (0.79, 50), "as_much_for_less": (0.8, 99), "more_for_less": (0.9, 60)}
    rows = [known] + [{"known": None, "recall": r, "bytes": b, "recipe": name} for name, (r, b) in points.items()]
    assert [scoring_pareto.beaten(known, rows[:end]) for end in (3, 4, 5)] == [None, "as_much_for_less", "more_for_less"]


def test_recipes_of_a_case_and_what_they_read(tmp_path: Path) -> None:
    case = scoring_pareto.made_up_case(600, tmp_path, heads=4, kv_heads=2, dim=16, steps=2)
    ours = ["coarse_to_fine(block=0, int8=false, exact=true)", "coarse_to_fine(block=0, int8=false, pairs=8, profile={fasa})"]
    ours += ["coarse_to_fine(block=0, int8=false, pairs=2, profile={fasa})"]
    table = scoring_pareto.measure(case, ours, lambda line: None)
    rows = {row["known"] or row["recipe"].split("profile")[0]: row for row in table["rows"]}
    flat, every, few = list(rows.values())[-3:]
    assert flat["recall"] == pytest.approx(every["recall"], abs=1e-6), "8 pairs are all dimensions"
    assert flat["recall"] >= max(row["recall"] for row in table["rows"]) - 1e-3
    assert few["recall"] < flat["recall"] and few["bytes"] < rows["fasa"]["bytes"]
    assert all(row["bytes"] > 30 * 2 * 2 * 16 * 4 for row in table["rows"])
    assert table["dense_bytes"] == 2 * 600 * 2 * 16 * 4 and table["budget"] == 30


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
