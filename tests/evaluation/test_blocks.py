"""Long generation: the budget is looked at along the text, and so is the fidelity."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import laconic
from laconic.evaluation import measure
from laconic.evaluation.blocks import along, budget_tokens, curves, sparkline
from laconic.evaluation.compare import Report
from laconic.evaluation.examples import Example
from laconic.evaluation.report import render
from laconic.recipe import Recipe


@pytest.fixture(scope="module")
def report(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """80 tokens after a prompt of 64, with a method that keeps to its budget, one that cuts once, and one that reads."""
    return laconic.compare(
        tiny, task="long_generation", lengths=[64], samples=2, max_new_tokens=80, progress=False,
        methods=["streaming:24", "snapkv(window=8):50%", "tokenselect:32"], output=tmp_path_factory.mktemp("long"),
    )  # fmt: skip


def test_blocks_cover_the_whole_text(report: Report) -> None:
    for row in report.rows:
        blocks = row["blocks"]
        assert blocks["size"] == 16 and len(blocks["fidelity"]) == len(blocks["kept"]) == 5
        sizes = [16, 16, 16, 16, 15]  # the first token comes from the prefill
        for name in ("fidelity", "kl"):
            assert sum(map(lambda a, b: a * b, blocks[name], sizes)) / 79 == pytest.approx(row[name], abs=1e-6)
    assert report.rows[0]["blocks"]["fidelity"] == [1.0] * 5 and report.rows[0]["blocks"]["holds"] is None


def test_whether_the_cache_stays_at_the_budget(report: Report) -> None:
    dense, streaming, snapkv, tokenselect = (row["blocks"] for row in report.rows)
    assert streaming["holds"] and streaming["kept"] == [24] * 5 and len(set(streaming["bytes_kept"])) == 1
    assert snapkv["holds"] is False and snapkv["of_budget"][0] > 1 and snapkv["of_budget"][-1] > 3
    assert tokenselect["holds"] and tokenselect["bytes_kept"] == dense["bytes_kept"], "reading less forgets nothing"
    assert dense["kept"] == [64 + 8.5 + 16 * i - 0.5 * (i == 4) for i in range(5)]


def test_table_and_page_show_it(report: Report) -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=120).print(report.table())
    lines = out.getvalue().splitlines()
    assert "along" in lines[1] + lines[2] and max(map(len, lines)) <= 120 and "█████" in out.getvalue()
    (snapkv,) = [line for line in lines if line.startswith("snapkv")]
    assert "×3" in snapkv and "yes" in next(line for line in lines if line.startswith("streaming"))
    page = render(report.rows, report.run)
    assert page.count('<svg class="curve"') == 4 + 3 and "no, up to ×3" in page and "Along the text" in page
    short = [{**row, "blocks": None} for row in report.rows]
    assert "curve" not in render(short, report.run).split("</style>")[1].split("<script")[0] and curves(short) is None


def test_dense_text_is_drawn_to_its_full_length_and_repeats(tiny: Any) -> None:
    runner = measure.Runner(*tiny)

    def text(seed: int | None) -> list[int]:
        (item,) = measure.prepare([Example("The quick brown fox", max_new_tokens=40, draw=seed)], tiny[1])
        return runner.run(item).forced

    drawn = text(1)
    assert drawn == text(1) != text(2) and drawn != text(None) and len(drawn) == 40
    runner.stop = set(drawn[:3])
    assert len(text(1)) == 40 and not runner.stop & set(text(1)), "the end mark is never drawn"


def test_long_texts_are_compared_in_pieces(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for steps in (256, 3):
        monkeypatch.setattr(measure, "STEPS", steps)
        runner = measure.Runner(*tiny)
        (item,) = measure.prepare([Example("The quick brown fox jumps over a dog", max_new_tokens=10, draw=0)], tiny[1])
        measure.keep_reference(item, runner.run(item), 1)
        with laconic.apply(tiny[0], "streaming:21") as handle:
            rows.append(measure.judge(runner, item, runner.run(item, handle), None))
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"]) and rows[0]["kl"] > 0 and rows[0]["fidelity"] == rows[1]["fidelity"]


def test_a_lean_run_keeps_no_distributions(tiny: Any) -> None:
    runner = measure.Runner(*tiny)
    (item,) = measure.prepare([Example("The quick brown fox", max_new_tokens=6)], tiny[1])
    lean, full = runner.run(item, lean=True), runner.run(item)
    assert lean.logits == [] and len(full.logits) == 6 and lean.forced == full.forced


@pytest.mark.parametrize(
    ("recipe", "tokens"),
    [("dense", None), ("h2o:64", 64), ("h2o:10%", 20), ("pyramid", 20.5), ("h2o:50% + tokenselect:10%", 20)],
)
def test_budget_tokens(recipe: str, tokens: float | None) -> None:
    """10 % of 200 tokens; a pyramid over 4 layers has 30, 24, 17 and 10 of them, rounded up."""
    recipe = "h2o:pyramid:10%" if recipe == "pyramid" else recipe
    found = budget_tokens(Recipe.parse(recipe), 200, 4)
    assert found == (pytest.approx(tokens, abs=0.3) if tokens else None)


def test_short_answers_have_no_blocks() -> None:
    item, trace = SimpleNamespace(prefill=9), SimpleNamespace(forced=[1] * 63, stats=[])
    assert along([item], [trace], Recipe.parse("dense"), 2) is None


def test_bars() -> None:
    assert sparkline([0.0, 0.3, 1.0]) == "▁▃█" and sparkline([1.0] * 16) == "█" * 8
    assert sparkline([0.9, 1.0], low=0.9) == "▁█" and sparkline([0.0, 1.0] * 8) == "▅" * 8
    assert sparkline([1.0], low=1.0) in "▁█", "no range to draw in"


def test_the_task_is_for_any_text_file(tiny: Any, tmp_path: Path) -> None:
    from laconic.evaluation.tasks import load_task

    (tmp_path / "text.txt").write_text("All is well that ends well. " * 100)
    task = load_task(f"long_generation:{tmp_path / 'text.txt'}", tiny[1], samples=2, lengths=[200])
    assert task.metric is None and len({example.draw for example in task.examples}) == 2
    assert all(abs(len(example.prompt) - 200) < 10 and example.max_new_tokens == 512 for example in task.examples)
