"""Tuning: the search finds what is cheapest, the held-out half has the last word, and an interruption changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

import laconic
from laconic.budget import Budget
from laconic.cli import app
from laconic.errors import LaconicError
from laconic.evaluation import measure, tune_tables
from laconic.evaluation.search import Search
from laconic.evaluation.search_space import Space, choose_entries, parameter_values, readable
from laconic.evaluation.tune import parse_share, split, tune
from laconic.evaluation.verdict import check, percent
from laconic.method import Method, parameter
from laconic.recipe import Recipe
from laconic.registry import get

TEXT = "The quick brown fox jumps over a lazy dog and runs away from one, two, three, four, five bears. "


@pytest.fixture
def task(tmp_path: Path) -> str:
    """Eight prompts without answers, of different lengths."""
    prompts = [TEXT[i % 7 :] + TEXT[: 10 + 9 * i] for i in range(8)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "max_new_tokens": 5}) + "\n" for text in prompts))
    return str(path)


def run(tiny: Any, task: str, output: Path, **options: Any):
    options = {"methods": ["streaming", "tova"], "keep": 0.2, "trials": 8, "progress": False, **options}
    return tune(tiny, task=task, output=output, **options)


def on_disk(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


# --- the whole


def test_the_recipe_is_the_cheapest_that_keeps_enough_and_its_file_works(tiny, task: str, tmp_path: Path) -> None:
    tuned = run(tiny, task, tmp_path / "out")
    good = [row for row in tuned.tried if row["stopped"] is None and row["kept_quality"] >= 0.2]
    assert len(tuned.tried) == 8 == len({row["recipe"] for row in tuned.tried})
    assert str(tuned) == min(good, key=lambda row: row["cost"])["recipe"] != "dense"
    assert [row["recipe"] for row in tuned.rows] == ["dense", str(tuned)]
    assert tuned.rows[0]["examples"] == tuned.verdict.prompts == 4, "half of the prompts are held out"
    assert tuned.rows[1]["bytes_read"] < tuned.rows[0]["bytes_read"]
    assert Recipe.load(tuned.path).methods == Recipe.parse(str(tuned.path)).methods == tuned.methods
    with laconic.apply(tiny[0], str(tuned.path)), laconic.apply(tiny[0], tuned):
        pass
    evidence = json.loads(tuned.path.read_text())["tuned"]
    assert evidence["keep"] == 0.2 and evidence["sentence"] == tuned.verdict.sentence and evidence["holds"] == tuned.holds


def test_the_figures_are_those_of_compare(tiny, task: str, tmp_path: Path) -> None:
    tuned = run(tiny, task, tmp_path / "out", methods="streaming:90", keep=0.05, trials=1)
    with open(task) as file:
        lines = file.readlines()
    held_out = [cell["meta"]["line"] for cell in tuned.rows[1]["cells"]]
    (tmp_path / "half.jsonl").write_text("".join(lines[number - 1] for number in held_out))
    report = laconic.compare(
        tiny, task=str(tmp_path / "half.jsonl"), methods=[str(tuned)], output=tmp_path / "report", progress=False
    )
    for name in ("fidelity", "kl", "bytes_read", "bytes_kept", "kept"):
        assert report.rows[1][name] == pytest.approx(tuned.rows[1][name])


def test_dense_stays_where_nothing_is_good_enough(tiny, task: str, tmp_path: Path) -> None:
    tuned = run(tiny, task, tmp_path / "out", methods="random", budgets="24", keep=1.0, trials=1)
    assert str(tuned) == "dense" and tuned.verdict.outcome == "dense" and tuned.holds
    assert "dense stays" in tuned.verdict.sentence and Recipe.load(tuned.path) == Recipe.parse("dense")


def test_an_interruption_changes_nothing(tiny, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tiny, task, tmp_path / "whole", trials=14)
    real, calls = measure.measure_cell, []

    def interrupted(*arguments: Any) -> dict:
        calls.append(arguments)
        if len(calls) in (8, 14):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measure, "measure_cell", interrupted)
    output = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt, match=r"tried recipes are kept in .* run the same command again"):
        run(tiny, task, output, trials=14)
    with open(output / "results.jsonl", "a") as file:
        file.write('{"run": "torn')  # what kill -9 in the middle of a write leaves
    with pytest.raises(KeyboardInterrupt):
        run(tiny, task, output, trials=14)
    tuned = run(tiny, task, output, trials=14)
    assert [(row["recipe"], row["stopped"]) for row in tuned.tried] == [(r["recipe"], r["stopped"]) for r in whole.tried]
    assert tuned == whole and tuned.verdict == whole.verdict
    calls[:] = [()] * 100
    assert run(tiny, task, output, trials=14) == whole and len(calls) == 100, "a finished run measures nothing"


def test_different_runs_do_not_mix_but_more_trials_go_on(tiny, task: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run(tiny, task, output, trials=3)
    for changes in ({"keep": 0.3}, {"cost": "kept"}, {"seed": 1}, {"methods": ["tova"]}):
        with pytest.raises(LaconicError, match=r"different run.*--overwrite"):
            run(tiny, task, output, **changes)
    with pytest.raises(LaconicError, match="different run"):
        laconic.compare(tiny, task=task, methods=["tova"], output=output, progress=False)
    wider = run(tiny, task, output, trials=6)
    assert wider.tried[:3] == first.tried and len(wider.tried) == 6
    checked = {row["recipe"] for row in on_disk(output) if row["half"] == "held_out"} - {"dense"}
    assert ("a little too kind" in wider.verdict.sentence) == (len(checked) > 1)
    assert len(run(tiny, task, output, keep=0.3, trials=2, overwrite=True).tried) == 2


def test_a_method_that_never_runs_is_named_and_all_of_them_are_an_error(tiny, task: str, tmp_path: Path) -> None:
    tuned = run(tiny, task, tmp_path / "out", methods=["snapkv(window=64):8", "streaming:24"], trials=2)
    assert [note for note in tuned.run["notes"] if note.startswith("snapkv(window=64):8 was left out: snapkv:")]
    assert "cannot run" in _shown(tuned)
    with pytest.raises(LaconicError, match="snapkv"):
        run(tiny, task, tmp_path / "none", methods=["snapkv(window=64):8"], trials=2)


def _shown(tuned: Any) -> str:
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=120).print(tune_tables.tried_table(tuned))
    return out.getvalue()


# --- the search


def fake_search(keep: float = 0.9, prompts: int = 20) -> Search:
    reference = {
        "recipe": "dense", "quality": 1.0, "quality_name": "exact", "bytes_read": 100.0,
        "cells": [{"correct": 1.0, "fidelity": 1.0}] * prompts, "costs": [100.0] * prompts,
    }  # fmt: skip
    return Search(Space(choose_entries(["h2o", "streaming"])), reference, keep=keep, cost="bytes_read", seed=0)


def fake_trial(search: Search, ask: Any) -> dict[str, Any]:
    """h2o needs 3 % of the tokens, streaming 30 %: each prompt is right when the budget reaches what it asks for."""
    share, need = ask.recipe.methods[0].budget.share, {"h2o": 0.03, "streaming": 0.3}[ask.recipe.methods[0].id]
    cells, costs = [], []
    for i in range(20):
        cells.append({"correct": float(share >= need * (1 if i < 18 else 2)), "fidelity": 1.0})
        costs.append(100 * share)
        if ask.enough({"cells": cells}, costs):
            break
    return search.judge({"cells": cells, "costs": costs, "bytes_read": costs[-1]}, ask)


def test_the_search_comes_close_to_the_optimum() -> None:
    search, prompts = fake_search(), 0
    for _ in range(25):
        ask = search.ask()
        row = fake_trial(search, ask)
        prompts += len(row["costs"])
        search.tell(ask, {**row, "recipe": str(ask.recipe), "params": ask.params})
    best = search.recipe.methods[0]
    assert best.id == "h2o" and 0.03 <= best.budget.share <= 0.034
    assert prompts < 25 * 20 / 2, "trials that have shown enough are given up"
    assert [row["params"]["method"] for row in search.rows[:2]] == ["h2o", "streaming"], "first every method once"


def test_a_method_that_needs_much_is_found_too() -> None:
    search = fake_search()
    search.space = Space(choose_entries(["streaming"]))
    search._starts = search.space.starts()
    for _ in range(16):
        ask = search.ask()
        search.tell(ask, {**fake_trial(search, ask), "recipe": str(ask.recipe), "params": ask.params})
    assert 0.3 <= search.recipe.methods[0].budget.share < 0.4


def test_what_is_given_up_was_lost_or_too_dear() -> None:
    search = fake_search()
    ask = search.ask()
    right, wrong = {"correct": 1.0, "fidelity": 1.0}, {"correct": 0.0, "fidelity": 0.0}
    assert not ask.enough({"cells": [wrong, wrong]}, [1.0, 1.0]), "18 of 20 are still possible"
    assert ask.enough({"cells": [wrong, wrong, right, wrong]}, [1.0] * 4) and ask.stopped == "quality"
    ask.stopped = None
    assert not ask.enough({"cells": [right] * 2}, [200.0] * 2), "two prompts say little about the cost"
    assert ask.enough({"cells": [right] * 3}, [200.0] * 3) and ask.stopped == "cost"


def test_parameters_and_what_is_tried_of_them() -> None:
    class Some(Method):
        id: ClassVar[str] = "some"
        count: int = parameter(8, "n", least=5)
        share: float = parameter(0.5, "s")
        flag: bool = parameter(True, "f")
        mode: str = parameter("a", "m", search=("a", "b"))
        other: str = parameter("x", "text without declared values")
        seed: int = parameter(3, "not searched", search=())

    method = dataclasses.dataclass(frozen=True, kw_only=True)(Some)
    assert parameter_values(method()) == {
        "count": (8, 16), "share": (0.5, 0.25, 0.75), "flag": (True, False), "mode": ("a", "b")
    }  # fmt: skip
    assert "count" not in parameter_values(method(count=20)), "what is set stays"
    assert parameter_values(get("snapkv"))["kernel"] == (7, 3), "an even kernel is refused"


def test_the_space_leaves_what_is_named_as_it_is() -> None:
    space = Space(choose_entries(["h2o(recent_share=0.1):50% + tokenselect"]))
    (start,) = space.starts()
    assert start["budget 1"] == 0.1 and "budget 0" not in start and not any(key.endswith("/recent_share") for key in start)
    with pytest.raises(LaconicError, match="no method to tune"):
        choose_entries(["dense"])
    names = [str(recipe) for recipe in choose_entries(None)]
    assert {"h2o", "snapkv", "tokenselect"} <= set(names) and not {"dense", "random"} & set(names)
    given = Space(choose_entries("h2o"), [Budget.parse("5%"), Budget.parse("64")])
    assert [point["budget 0"] for point in given.starts()] == ["5%", "64"] and given.cheaper(given.starts()[0], []) is None


def test_bisection_of_a_budget() -> None:
    space = Space(choose_entries("streaming"))
    best = {"method": "streaming", "budget 0": 0.16, "shape 0": "uniform"}
    point = space.cheaper(best, [{**best, "budget 0": 0.04}, {**best, "budget 0": 0.1, "shape 0": "pyramid"}])
    assert point == {**best, "budget 0": pytest.approx(0.08)}
    assert space.cheaper(best, [{**best, "budget 0": 0.15}]) is None
    assert space.larger(best) == {**best, "budget 0": pytest.approx(0.358, abs=0.001)}
    assert space.larger({**best, "budget 0": 0.75}) is None
    assert str(readable(0.04321)) == "4.3%" and str(readable(0.04321, "pyramid")) == "pyramid:4.3%"


# --- the split and the verdict


def test_the_halves_are_alike_and_share_nothing(tiny) -> None:
    from laconic.evaluation.examples import Example

    examples = [Example("x" * (10 + 7 * i), None if i % 3 else "x") for i in range(21)]
    items = measure.prepare(examples, tiny[1])
    search, held_out = split(items, 0)
    assert len(search) == 11 and len(held_out) == 10
    assert {id(item) for item in search} | {id(item) for item in held_out} == set(map(id, items))
    mean = [sum(len(item.ids) for item in half) / len(half) for half in (search, held_out)]
    assert abs(mean[0] - mean[1]) < 15
    assert abs(sum(i.example.answer is None for i in search) - sum(i.example.answer is None for i in held_out)) <= 2
    assert split(items, 0)[0] == search and split(items, 1)[0] != search
    with pytest.raises(LaconicError, match="has 3 prompts"):
        split(items[:3], 0)


def verdict(right: int, count: int, keep: float = 0.9, looks: int = 1):
    def row(recipe: str, good: int) -> dict:
        cells = [{"correct": float(i < good), "fidelity": 1.0} for i in range(count)]
        return {"recipe": recipe, "quality": good / count, "quality_name": "exact", "cells": cells}

    return check(row("h2o:10%", right), row("dense", count), keep=keep, looks=looks, seed=0)


def test_the_verdict_says_plainly_whether_it_holds() -> None:
    fails, unsure, shown = verdict(8, 10), verdict(10, 10), verdict(200, 200)
    assert fails.outcome == "fails" and not fails.holds and fails.sentence.startswith("Does not hold: on 10 prompts")
    assert "keeps 80% of the dense quality" in fails.sentence
    assert unsure.outcome == "holds" and unsure.holds and "some 35 held-out prompts" in unsure.sentence
    assert shown.outcome == "shown" and shown.sentence.startswith("Holds: ") and shown.low > 0.9
    assert "recipe number 2" in verdict(8, 10, looks=2).sentence
    for found in (fails, unsure, shown):
        assert found.low <= found.kept <= found.high and math.isclose(found.level, 0.95)
    assert percent(0.99999) == "99.9%" and percent(1.0) == "100%" and percent(0.125) == "12.5%"


# --- the command


def command(*arguments: object):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def test_the_command(tiny_path: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/laconic", "tune", "--keep", "20%"])
    arguments = ["--model", tiny_path, "--task", task, "--methods", "streaming,tova", "--trials", 4, "--keep", "20%"]
    output = tmp_path / "out"
    shown = command(*arguments, "--output", output)
    assert shown.exit_code == 0, shown.output
    assert "4 recipes tried, keep 20%" in shown.stdout and f"File: {output / 'recipe.json'}" in shown.stdout.replace("\n", "")
    found = json.loads(command(*arguments, "--output", output, "--json").stdout)
    assert {"recipe", "file", "verdict", "run", "rows", "tried"} == found.keys()
    assert f"Recipe: {found['recipe']}\n" in shown.stdout and found["run"]["command"] == "laconic tune --keep 20%"
    assert found["verdict"]["sentence"] in shown.stdout
    generated = CliRunner().invoke(
        app, ["generate", "--model", tiny_path, "--method", found["file"], "--max-new-tokens", "2", "--json", "a prompt " * 9]
    )
    assert json.loads(generated.stdout)["method"] == found["recipe"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "150%"], "keep is '150%'"),
        (["--keep", "99"], "keep is '99'"),
        (["--keep", "most"], "keep is 'most'"),
        (["--cost", "money"], "cost is 'money'"),
        (["--trials", "0"], "trials is 0"),
        (["--methods", "h20"], "did you mean 'h2o'"),
        (["--methods", "dense"], "no method to tune"),
        (["--budgets", "150%"], "Budget"),
        (["--samples", "0"], "samples is 0"),
        (["--samples", "3"], "tune needs at least 4"),
        (["--question", "later"], "question"),
        (["--task", "no-such-task"], "no-such-task"),
        (["--output", "/proc/laconic"], "/proc/laconic"),
    ],
)
def test_bad_input(tiny_path: str, task: str, tmp_path: Path, arguments: list[str], words: str) -> None:
    options = {"--model": tiny_path, "--task": task, "--output": str(tmp_path / "out"), "--methods": "streaming"}
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = command(*[part for pair in options.items() for part in pair])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and words in lines[0]


def test_a_task_that_dense_cannot_do(tiny, task: str, tmp_path: Path) -> None:
    with open(task) as file:
        lines = [json.loads(line) | {"answer": "not what a random model says"} for line in file]
    Path(task).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(LaconicError, match="gets none of the 4 prompts right"):
        run(tiny, task, tmp_path / "out")


def test_shares() -> None:
    assert parse_share("99%") == parse_share(0.99) == 0.99 and parse_share("100%") == parse_share(1) == 1.0


def test_what_takes_no_budget_gets_none_from_the_search() -> None:
    from laconic.evaluation.search_space import Entry

    assert Entry(Recipe.parse("tokenselect + zerotuning(gamma=2)")).free == [True, False]
