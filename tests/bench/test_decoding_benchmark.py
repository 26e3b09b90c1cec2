"""benchmarks/decoding.py: its quick run, that its JSON hangs together, and the tables and the picture in the documentation."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import tiny as models

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return script("decoding")


@pytest.fixture(scope="module")
def result(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("decoding") / "decoding.json"
    returned = benchmark.main(["--quick", "--output", str(path)])
    found = json.loads(path.read_text())
    assert found["sizes"]["new"] == returned["sizes"]["new"] == 8
    return found


def test_every_contender_has_figures_or_the_reason_why_not(result: dict[str, Any]) -> None:
    rows = result["peers"]
    names = {row["name"] for row in rows}
    assert {"transformers", "transformers prompt lookup", "transformers assisted", "plain", "prompt_lookup"} <= names
    assert len(rows) == len(names) * 2 * 2
    for row in rows:
        assert ("error" in row) != (row.get("seconds_per_token", 0) > 0)
        assert row["name"] not in ("transformers", "plain") or row["tokens_per_forward"] == 1


def test_greedy_texts_are_those_of_transformers(result: dict[str, Any]) -> None:
    greedy = [row for row in result["peers"] if row["temperature"] == 0 and "error" not in row]
    assert greedy and all(row["same_ids"] for row in greedy)
    assert all(row["same_ids"] is None for row in result["peers"] if row["temperature"] and "error" not in row)


def test_ours_runs_in_batches_where_theirs_does_not(result: dict[str, Any]) -> None:
    batched = [row for row in result["peers"] if row["batch"] > 1]
    theirs = [row for row in batched if row["name"].startswith("transformers ")]
    assert theirs and all("batch_size = 1" in row["error"] for row in theirs)
    assert not any("error" in row for row in batched if not row["name"].startswith("transformers "))
    pairs = {(row["theirs"], row["batch"]): row for row in result["pairs"]}
    assert pairs["transformers", 1]["ratio"] > 0 and pairs["transformers prompt lookup", 2]["ratio"] is None


def test_replay_and_costs(result: dict[str, Any]) -> None:
    plain, *others = result["replay"]
    assert plain["against_plain"] == 1 and plain["tokens_per_forward"] == 1 and others
    for row in result["costs"]:
        assert set(row["forward_ms"]) == set(row["settle_ms"]) == {"1", "4"} and row["of_one"]["1"] == 1
        assert row["fork_ms"] > 0 and all(math.isfinite(ms) and ms > 0 for ms in row["forward_ms"].values())


def test_the_burden_pays_a_forward_of_as_many_tokens(benchmark: ModuleType) -> None:
    from laconic.decoding.engine import decode

    model, large = models.build("llama"), models.build("llama", num_hidden_layers=1)
    fed: list[tuple[int, int]] = []
    burden = benchmark.Burden(large, 16)
    hook = model.register_forward_pre_hook(burden, with_kwargs=True)
    large.register_forward_pre_hook(
        lambda module, args, named: fed.append((args[0].shape[1], burden.cache.get_seq_length())), with_kwargs=True
    )
    inputs = {"input_ids": models.prompt(1, 16)["input_ids"]}
    out = decode(model, inputs, "token_recycling:6", max_new_tokens=12)
    hook.remove()
    assert out.rows == decode(model, inputs, max_new_tokens=12).rows
    assert len(fed) == out.forwards and sum(count for count, _ in fed[1:]) == out.nodes
    assert fed[0] == (16, 16) and {held for _, held in fed} == {16}, "the larger text is as long before every forward"
    assert burden.cache.get_seq_length() == 16 and torch.is_tensor(burden.cache.layers[0].keys)


def test_unknown_parts_are_refused(benchmark: ModuleType) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--parts", "speed"])


def test_tables_go_where_the_documentation_has_a_place_for_them(
    result: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    from laconic.evaluation.decoding_suite import decoding_suite

    options: dict[str, Any] = {"samples": 1, "max_new_tokens": 6, "length": 20, "workloads": ["code"], "batches": (1,)}
    report = decoding_suite(tiny, methods=["prompt_lookup:4"], output=tmp_path / "report", progress=False, **options)
    (tmp_path / "bench.json").write_text(json.dumps(result))
    page = tmp_path / "decoding.md"
    page.write_text((ROOT / "docs" / "decoding.md").read_text())
    arguments = [str(page), "--suite", str(report.path), "--bench", str(tmp_path / "bench.json")]
    script("decoding_tables").main(arguments)
    text = page.read_text()
    row = report.rows[0]
    assert f"| `prompt_lookup:4` | 0 | 1 | {row['tokens_per_forward']:.2f}, " in text and "| yes |" in text
    assert "| transformers prompt lookup | `prompt_lookup` | 0 | 2 | theirs: assisted generate is only" in text
    assert "| `token_recycling:24` | " in text.split("replay: begin")[1]
    assert "filled in by the command" not in text
    script("decoding_tables").main(arguments)
    assert page.read_text() == text, "again, it is the same"


def test_the_picture_has_every_node_and_marks_the_accepted(tmp_path: Path) -> None:
    from laconic.decoding.engine import Progress

    picture = script("draft_tree")

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "<ab c"[ids[0]]

    step = Progress([[0, 1, 2, 3]], [[-1, 0, 0, 1]], [[1, 3]], [[1, 3, 4]])
    svg = picture.draw(step, Letters())
    assert svg.count("<rect") == 5 and svg.count('class="yes"><rect') == 3 and svg.count('class="own"><rect') == 1
    assert svg.count("<path") == 4 and "&lt;" in svg and "·" in svg
    assert picture.rows_of([-1, 0, 0, 1]) == [0.5, 0, 1, 0]
