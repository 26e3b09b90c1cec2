"""Every benchmark runs, with tiny sizes, and says what it must."""

from __future__ import annotations

import json
import pkgutil
from typing import Any

import pytest

from laconic.bench import run, suite
from laconic.errors import LaconicError

CONDITIONS = {
    "dense_decode": {"bandwidth", "same_output"},
    "tokenselect_decode": {"attention_mass"},
    "cache_reduction": {"figures_say_the_same", "step_is_faster"},
    "scoring_pareto": {"needle_512_all_beaten", "made_up_1024_all_beaten"},
    "prefill_methods": {"token_sparse_attention_far"},
    "whole_prompt": {"tca_attention_is_faster"},
    "read_methods": {"faster_than_exact_512", "faster_than_exact_1024"},
    "decode_step": {"128k", "same_output"},
    "decode_memory": {"same_tokens"},
    "column_sums": {"memory", "same_output"},
    "greedy_selection": {
        f"same_picks_{rule}" for rule in ("divprune", "k_center", "mmr", "max_sum", "coverage", "determinant")
    },
    "encoder_scores": {"class_token", "memory", "same_output"},
    "picture_prefill": {"overhead", "cache"},
    "import_time": set(),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    lines: list[str] = []
    rows = run.run_all(quick=True, progress=lines.append)
    assert all(any(line.startswith(f"{row['name']}: ") for line in lines) for row in rows)
    return {row["name"]: row for row in rows}


def test_there_is_one_module_per_name() -> None:
    assert {module.name for module in pkgutil.iter_modules(suite.__path__)} == set(run.benchmark_names())
    assert [row["name"] for row in run.benchmarks()] == run.benchmark_names()
    assert all(row["summary"] for row in run.benchmarks())


@pytest.mark.parametrize("name", run.benchmark_names())
def test_outcome_is_well_formed(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    row = outcomes[name]
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["ours"] > 0 and row["reference"] > 0 and row["target"] > 0
    assert row["ratio"] == pytest.approx(row["reference"] / row["ours"])
    assert row["met"] == (row["ratio"] >= row["target"] and all(row["conditions"].values()))
    assert set(row["conditions"]) == CONDITIONS[name]
    assert row["unit"] and row["goal"] and row["quick"] is True and row["seconds"] > 0
    assert row["command"] == f"laconic bench {name} --json --quick"
    assert row["machine"]["cores"] >= 1 and row["machine"]["versions"]["torch"]


@pytest.mark.parametrize("name", ["dense_decode", "decode_step", "decode_memory", "column_sums", "encoder_scores"])
def test_both_sides_compute_the_same(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    conditions = outcomes[name]["conditions"]
    assert conditions.get("same_output", True) and conditions.get("same_tokens", True)


def test_fewer_tokens_are_read_and_8_bits_read_fewer_bytes(outcomes: dict[str, dict[str, Any]]) -> None:
    detail = outcomes["tokenselect_decode"]["detail"]
    exact, int8 = detail["variants"]["exact"], detail["variants"]["int8"]
    assert int8["bytes_read"] < exact["bytes_read"] < detail["cache_bytes"]
    assert int8["share_of_exact_mass"] >= 0.99
    assert exact["attention_mass"] < 1


def test_the_cache_holds_what_is_left_of_the_pictures(outcomes: dict[str, dict[str, Any]]) -> None:
    for number, sizes in outcomes["picture_prefill"]["detail"]["pictures"].items():
        tokens, rows = sizes["tokens"], sizes["rows"]
        left = tokens - int(number) * (36 - 4)  # 11.1 % of 36 tokens are 4
        assert rows["stock"]["cache_share"] == 1
        assert all(rows[name]["cache_share"] == pytest.approx(left / tokens) for name in ("random_prune", "divprune", "flowcut"))
        assert left / tokens < rows["fastv"]["cache_share"] < 1


def test_the_written_tokens_vary(outcomes: dict[str, dict[str, Any]]) -> None:
    assert len(set(outcomes["decode_memory"]["detail"]["ours"]["tokens"])) > 1


@pytest.mark.parametrize(("name", "near"), [("dense_decod", "dense_decode"), ("Column-Sums", "column_sums")])
def test_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(LaconicError, match=f"no benchmark '{name}'.*did you mean '{near}'"):
        run.run_benchmark(name)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(LaconicError, match="import_time"):
        run.run_benchmark("xyz")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 bytes")])
def test_too_little_memory_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from laconic.bench.suite import column_sums

    def fail(quick: bool, say: object) -> None:
        raise error

    monkeypatch.setattr(column_sums, "run", fail)
    with pytest.raises(LaconicError, match="column_sums needs more memory"):
        run.run_benchmark("column_sums", progress=lambda line: None)


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from laconic.bench.suite import column_sums

    monkeypatch.setattr(column_sums, "run", lambda quick, say: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run_benchmark("column_sums", progress=lambda line: None)
