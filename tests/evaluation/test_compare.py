"""The main job on a tiny model: what a cell holds, and what happens when a run is cut off, repeated or changed."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from laconic.errors import LaconicError
from laconic.evaluation import compare as module
from laconic.evaluation import measure
from laconic.evaluation.compare import compare

PROMPTS = [
    {"prompt": "The quick brown fox jumps over the lazy dog, and then it says", "answer": "hello", "max_new_tokens": 5},
    {"prompt": "A second, rather longer prompt, so that the lengths differ: one two three four", "answer": "x"},
]
FIELDS = {
    "run", "method", "recipe", "budget", "task", "quality", "quality_name", "fidelity", "kl", "kept", "kept_share",
    "bytes_kept", "bytes_read", "pairs", "prefill_s", "decode_s", "peak_bytes", "peak_source", "dropped_mass", "examples",
    "guarantee", "cells", "blocks",
}  # fmt: skip


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps({"max_new_tokens": 5, **row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def task(tmp_path: Path) -> str:
    return jsonl(tmp_path / "mine.jsonl", PROMPTS)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has tests of its own."""
    monkeypatch.setattr(module, "_write_page", lambda directory: directory / "index.html")


def run(tiny: Any, task: str, output: Path, **options: Any):
    options = {"methods": ["h2o", "streaming"], "budgets": ["24", "50%"], "progress": False, **options}
    return compare(tiny, task=task, output=output, **options)


def on_disk(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_every_cell_has_every_figure(tiny, task: str, tmp_path: Path) -> None:
    report = run(tiny, task, tmp_path / "report")
    assert [r["recipe"] for r in report.rows] == ["dense", "h2o:24", "h2o:50%", "streaming:24", "streaming:50%"]
    assert report.rows == on_disk(tmp_path / "report")
    for row in report.rows:
        assert row.keys() == FIELDS
        assert row["examples"] == len(row["cells"]) == 2
        assert 0 <= row["fidelity"] <= 1 and row["kl"] >= 0 and row["prefill_s"] > 0 and row["decode_s"] > 0
        assert row["bytes_kept"] > 0 and row["bytes_read"] > 0 and row["kept"] > 0 and row["peak_bytes"] >= 0
    dense, small = report.rows[0], report.rows[1]
    assert dense["fidelity"] == 1 and dense["kl"] == pytest.approx(0, abs=1e-6) and dense["kept_share"] == dense["pairs"] == 1
    assert small["kept"] <= 24 and small["bytes_kept"] < dense["bytes_kept"] and small["kl"] > 0
    header = json.loads((tmp_path / "report" / "run.json").read_text())
    assert header["fingerprint"] == dense["run"] and header["finished"] and header["command"].startswith("laconic.comp")
    assert {"versions", "machine", "model", "task", "seed", "started"} <= header.keys()


def test_a_full_budget_is_dense(tiny, task: str, tmp_path: Path) -> None:
    report = run(tiny, task, tmp_path / "report", budgets=["100%"])
    for row in report.rows:
        assert row["fidelity"] == 1 and row["kl"] < 1e-5 and row["dropped_mass"] == pytest.approx(0, abs=1e-5)
        assert [c["prediction"] for c in row["cells"]] == [c["prediction"] for c in report.rows[0]["cells"]]


def test_own_text_is_what_generate_gives(tiny, task: str, tmp_path: Path) -> None:
    """Forced decoding plus a fork must end in the text that generate writes under the same method."""
    import laconic

    model, tokenizer = tiny
    report = run(tiny, task, tmp_path / "report", methods=["streaming"], budgets=["24"])
    differs = 0
    for cell, prompt in zip(report.rows[1]["cells"], PROMPTS, strict=True):
        inputs = tokenizer(prompt["prompt"], return_tensors="pt", return_token_type_ids=False)
        handle = laconic.apply(model, "streaming:24")
        with handle:
            out = model.generate(**inputs, do_sample=False, max_new_tokens=5)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert cell["prediction"] == text
        differs += cell["fidelity"] < 1
    assert differs, "the method never left the dense text, so the fork was not tried"


def test_without_answers_there_is_fidelity_only(tiny, tmp_path: Path) -> None:
    report = run(tiny, jsonl(tmp_path / "t.jsonl", [{"prompt": "No answer is known for this prompt"}]), tmp_path / "r")
    assert all(r["quality"] is None and r["quality_name"] is None for r in report.rows)
    assert report.best(keep=0.0)["bytes_read"] == min(r["bytes_read"] for r in report.rows)


def test_best_takes_the_cheapest_that_is_good_enough(tmp_path: Path) -> None:
    def row(method: str, quality: float, read: int, name: str = "exact") -> dict:
        return {"method": method, "quality": quality, "quality_name": name, "fidelity": 1.0, "bytes_read": read}

    rows = [row("dense", 0.9, 100), row("a", 0.9, 50), row("b", 0.895, 20), row("c", 0.5, 10)]
    report = module.Report(tmp_path, rows, {})
    assert report.best()["method"] == "b" and report.best(keep=1)["method"] == "a" and report.best(0.5)["method"] == "c"
    worse = [row("dense", 10.0, 100, "perplexity"), row("a", 10.05, 50, "perplexity"), row("b", 12, 1, "perplexity")]
    assert module.Report(tmp_path, worse, {}).best()["method"] == "a"


def test_an_interrupted_run_goes_on_where_it_stopped(tiny, task: str, tmp_path: Path, monkeypatch) -> None:
    measured: list[str] = []
    real = measure.measure_cell

    def counted(runner: Any, items: Any, metric: Any, recipe: Any, advance: Any) -> dict:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(str(recipe))
        return real(runner, items, metric, recipe, advance)

    pages: list[Path] = []
    monkeypatch.setattr(measure, "measure_cell", counted)
    monkeypatch.setattr(module, "_write_page", lambda directory: pages.append(directory) or directory / "index.html")
    output = tmp_path / "report"
    with pytest.raises(KeyboardInterrupt, match=r"3 of 5 cells are kept .* run the same command again"):
        run(tiny, task, output)
    kept = on_disk(output)
    assert [r["recipe"] for r in kept] == ["dense", "h2o:24", "h2o:50%"]
    assert pages == [output], "there is a page of what is kept"
    assert json.loads((output / "run.json").read_text())["finished"] is None
    with open(output / "results.jsonl", "a") as file:
        file.write('{"run": "torn')  # what kill -9 in the middle of a write leaves
    measured[:] = ["none"] * 10
    report = run(tiny, task, output)
    assert measured[10:] == ["dense", "streaming:24", "streaming:50%"]  # dense anew, in memory, to compare with
    assert on_disk(output)[:3] == kept and len(on_disk(output)) == len(report.rows) == 5
    assert any("line 4 was cut off" in note for note in report.notes)
    measured.clear()
    run(tiny, task, output)
    assert measured == [], "a finished run measures nothing"


def test_a_run_can_be_widened_but_not_mixed(tiny, task: str, tmp_path: Path) -> None:
    output = tmp_path / "report"
    run(tiny, task, output, methods=["streaming"], budgets=["24"])
    wider = run(tiny, task, output, methods=["streaming", "knorm"], budgets=["24"])
    assert len(on_disk(output)) == len(wider.rows) == 3
    before = (output / "results.jsonl").read_bytes()
    with pytest.raises(LaconicError, match=r"different run .its seed is 0, now 1.*--overwrite"):
        run(tiny, task, output, seed=1)
    other = jsonl(tmp_path / "other.jsonl", PROMPTS[:1])
    with pytest.raises(LaconicError, match=r"different run"):
        run(tiny, other, output)
    assert (output / "results.jsonl").read_bytes() == before
    assert len(run(tiny, other, output, overwrite=True).rows) == 5 == len(on_disk(output))


def test_other_weights_are_another_run(tiny, task: str, tmp_path: Path) -> None:
    import copy

    model, tokenizer = tiny
    output = tmp_path / "report"
    run(tiny, task, output, methods=["streaming"])
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data += 0.5
    with pytest.raises(LaconicError, match=r"different run .its weights"):
        run((changed, tokenizer), task, output, methods=["streaming"])


def test_a_method_that_refuses_the_model_is_left_out_with_its_reason(
    tiny, task: str, tmp_path: Path, monkeypatch
) -> None:
    real = measure.measure_cell

    def refuse(runner: Any, items: Any, metric: Any, recipe: Any, advance: Any) -> dict:
        if "h2o" in str(recipe):
            raise LaconicError("h2o cannot do this")
        return real(runner, items, metric, recipe, advance)

    monkeypatch.setattr(measure, "measure_cell", refuse)
    report = run(tiny, task, tmp_path / "report", budgets=["24"])
    assert [r["method"] for r in report.rows] == ["dense", "streaming"]
    assert report.run["skipped"] == [{"recipe": "h2o:24", "reason": "h2o cannot do this"}]
    with pytest.raises(LaconicError, match="h2o cannot do this"):
        run(tiny, task, tmp_path / "report", methods=["h2o"], budgets=["24"])


def test_a_warm_up_that_is_too_short_for_a_share_is_no_verdict(tiny, tmp_path: Path, monkeypatch) -> None:
    """5% of 1,024 tokens is room enough for knorm's protected tokens; 5% of what the warm-up takes must not count."""
    task = jsonl(tmp_path / "long.jsonl", [{"prompt": "word " * 205, "answer": "x", "max_new_tokens": 2}])
    monkeypatch.setattr(measure, "warm_up", functools.partial(measure.warm_up, tokens=64))
    report = run(tiny, task, tmp_path / "report", methods=["knorm"], budgets=["5%"])
    assert [r["recipe"] for r in report.rows] == ["dense", "knorm:5%"] and report.run["skipped"] == []


def test_the_model_is_left_as_it_was(tiny, task: str, tmp_path: Path) -> None:
    model, _ = tiny
    implementation = model.config._attn_implementation
    run(tiny, task, tmp_path / "report", methods=["streaming"], budgets=["24"])
    assert model.config._attn_implementation == implementation and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"methods": ["tokenselct"]}, "did you mean 'tokenselect'"),
        ({"budgets": ["0"]}, "Budget"),
        ({"budgets": ["-5"]}, "Budget"),
        ({"budgets": ["150%"]}, "Budget"),
        ({"question": "later"}, "question"),
        ({"question": "after"}, "--question seen"),
        ({"samples": 0}, "samples is 0"),
        ({"max_new_tokens": -1}, "max-new-tokens is -1"),
        ({"task": "no-such-task"}, "no-such-task"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_results(
    tiny, task: str, tmp_path: Path, options: dict, sentence: str
) -> None:
    with pytest.raises(LaconicError, match=sentence) as caught:
        run(tiny, options.pop("task", task), tmp_path / "report", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report" / "results.jsonl").exists()


KILLED = """
    import sys, time
    from laconic.evaluation import measure
    from laconic.evaluation.compare import compare
    real, count = measure.measure_cell, 0
    def slow(*arguments):
        global count
        count += 1
        if count == 3:
            print("ready", flush=True)
            time.sleep(60)
        return real(*arguments)
    measure.measure_cell = slow
    model, task, output = sys.argv[1:]
    compare(model, task=task, output=output, methods=["h2o", "streaming"], budgets=["24"], progress=False)
"""


def test_kill_9_costs_one_cell_at_most(tiny_path: str, task: str, tmp_path: Path) -> None:
    output = tmp_path / "report"
    arguments = [sys.executable, "-c", textwrap.dedent(KILLED), tiny_path, task, str(output)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGKILL)
    assert [r["recipe"] for r in on_disk(output)] == ["dense", "h2o:24"]
    started = time.time()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = compare(
            tiny_path, task=task, output=output, methods=["h2o", "streaming"], budgets=["24"], progress=False
        )
    finally:
        torch.set_num_threads(threads)
    assert [r["recipe"] for r in report.rows] == ["dense", "h2o:24", "streaming:24"] and time.time() - started < 60
