"""The decoding suite: what it measures, that it goes on where it stopped, and what its page and its JSON say."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from laconic.cli import app
from laconic.decoding.base import Drafter, DraftMethod
from laconic.decoding.engine import decode
from laconic.errors import LaconicError
from laconic.evaluation import decoding_suite as module
from laconic.evaluation.decoding_suite import decoding_suite, plain_of, plan_drafts
from laconic.evaluation.drafting_texts import TEXTS, prompts
from laconic.recipe import Recipe
from laconic.registry import _methods, find, methods, register

DRAFTS = ["prompt_lookup:4", "token_recycling:6"]


def run(tiny: tuple[Any, Any], output: Path, **options: Any) -> module.DecodingReport:
    settings: dict[str, Any] = {"methods": DRAFTS, "samples": 1, "max_new_tokens": 12, "length": 40, "batches": (1, 2)}
    return decoding_suite(tiny, output=output, progress=False, **{**settings, **options})


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory: pytest.TempPathFactory) -> module.DecodingReport:
    return run(tiny, tmp_path_factory.mktemp("suite") / "report")


def words(html: str) -> str:
    visible = re.sub(r"<(script|style)\b.*?</\1>", " ", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", visible.replace("<wbr>", ""))).split())


# --- texts


@pytest.mark.parametrize("name", TEXTS)
def test_prompts_are_as_long_as_asked_and_the_same_with_the_same_seed(tiny, name: str) -> None:
    tokenizer = tiny[1]
    found = prompts(name, tokenizer, 3, 60, seed=0)
    assert [len(tokenizer(text)["input_ids"]) for text in found] == pytest.approx([60] * 3, abs=3)
    assert len(set(found)) == 3 and found == prompts(name, tokenizer, 3, 60, seed=0) != prompts(name, tokenizer, 3, 60, seed=1)
    assert prompts(name, tokenizer, 2, 60, seed=0) == found[:2], "more samples leave the first as they were"


def test_logs_repeat_themselves_more_than_prose(tiny) -> None:
    import zlib

    size = {name: len(zlib.compress(prompts(name, tiny[1], 1, 1500, seed=0)[0].encode())) for name in TEXTS}
    assert size["repetitive"] < 0.6 * min(size["prose"], size["code"])


# --- what runs


def test_every_method_that_drafts_is_run_by_default_at_its_own_budget() -> None:
    cells, left_out = plan_drafts(None, None)
    drafting = {row["id"] for row in methods() if issubclass(find(row["id"]), DraftMethod)}
    assert {"prompt_lookup", "token_recycling"} <= drafting
    assert {cell.recipe.methods[0].id for cell in cells} | {name for name, _ in left_out} == drafting
    assert all(cell.recipe.methods[0].budget == type(cell.recipe.methods[0])().budget for cell in cells)


def test_budgets_are_for_names_without_one() -> None:
    sizes = ["4", "9"]
    keys = [cell.key for cell in plan_drafts(["token_recycling", "prompt_lookup:3", "prompt_lookup(ngram=2)"], sizes)[0]]
    own = ["prompt_lookup:3", "prompt_lookup(ngram=2):4", "prompt_lookup(ngram=2):9"]
    assert keys == ["token_recycling:4", "token_recycling:9", *own]
    both = plan_drafts(["tokenselect:30 + token_recycling"], sizes)[0]
    assert [cell.key for cell in both] == ["tokenselect:30 + token_recycling:4", "tokenselect:30 + token_recycling:9"]
    assert str(plain_of(both[0].recipe)) == "tokenselect:30" and str(plain_of(Recipe.parse("prompt_lookup"))) == "dense"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["tokenselect:30"]}, "drafts nothing"),
        ({"methods": ["token_recyclin"]}, "did you mean 'token_recycling'"),
        ({"workloads": ["poems"]}, "no workload 'poems'"),
        ({"temperatures": ()}, "Temperatures"),
        ({"temperatures": (-1.0,)}, "Temperatures"),
        ({"batches": (0,)}, "Batches"),
        ({"budgets": ["10%"]}, "tokens drafted in each forward"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_what_cannot_be_run_is_refused(tiny, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LaconicError, match=words):
        run(tiny, tmp_path, **{"methods": ["token_recycling"], **options})


# --- what is measured


def test_there_is_a_row_for_every_recipe_text_temperature_and_batch(report: module.DecodingReport) -> None:
    keys = [(row["recipe"], row["task"], row["temperature"], row["batch"]) for row in report.rows]
    assert len(set(keys)) == len(keys) == len(DRAFTS) * len(TEXTS) * 2 * 2
    assert {key[0] for key in keys} == set(DRAFTS) and {key[1] for key in keys} == set(TEXTS)


def test_figures_hang_together(report: module.DecodingReport) -> None:
    for row in report.rows:
        accepted, steps = row["accepted"], sum(row["accepted"])
        assert row["tokens"] == 11 * row["texts"] and row["texts"] == row["batch"]
        assert row["tokens_per_forward"] == pytest.approx(sum((n + 1) * times for n, times in enumerate(accepted)) / steps)
        assert row["tokens_per_forward"] >= 1 and len(accepted) - 1 <= 6
        assert row["plain_forwards"] == 11 >= row["forwards"]
        assert 1 <= row["nodes_per_forward"] <= 1 + int(row["budget"])
        assert row["decode_s"] > 0 and row["speedup"] == pytest.approx(row["plain_s"] / row["decode_s"])
        assert 0 < row["draft_share"] < 1 and row["guarantee"] == "exact in distribution"
        assert (row["exact"], row["equal"]) == ((True, row["texts"]) if row["temperature"] == 0 else (None, None))
        assert (row["draft_bytes"] > 0) == row["method"].startswith("token_recycling")


def test_a_row_is_what_decode_gives(tiny, report: module.DecodingReport) -> None:
    network, tokenizer = tiny
    text = prompts("repetitive", tokenizer, 2, 40, seed=0)[0]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = decode(network, {"input_ids": ids}, "token_recycling:6", max_new_tokens=12)
    row = next(
        row for row in report.rows
        if (row["recipe"], row["task"], row["temperature"], row["batch"]) == ("token_recycling:6", "repetitive", 0, 1)
    )  # fmt: skip
    assert row["accepted"] == out.accepted and row["forwards"] == out.forwards - 1 and row["draft_bytes"] == out.draft_bytes


def test_a_text_that_differs_is_counted(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: Any, inputs: Any, recipe: Recipe, **options: Any) -> Any:
        out = decode(network, inputs, recipe, **options)
        if "prompt_lookup" in str(recipe):
            out.rows[0][-1] += 1
        return out

    monkeypatch.setattr(module, "decode", wrong)
    options: dict[str, Any] = {"workloads": ["prose"], "batches": (2,), "temperatures": (0,)}
    found = run(tiny, tmp_path, methods=["prompt_lookup(verifier=typical):4", "token_recycling:6"], **options)
    lossy, exact = found.rows
    assert (lossy["guarantee"], lossy["exact"]) == ("lossy", False) and lossy["equal"] < lossy["texts"] == 2
    assert (exact["guarantee"], exact["exact"], exact["equal"]) == ("exact in distribution", True, 2)
    assert f"{lossy['equal']} of 2" in words(found.html.read_text())


def test_a_sparse_recipe_is_compared_with_itself_undrafted(tiny, tmp_path: Path) -> None:
    recipe = "tokenselect(recent=4):12 + token_recycling:6"
    found = run(tiny, tmp_path, methods=[recipe], workloads=["repetitive"], temperatures=(0,))
    assert [(row["recipe"], row["batch"], row["exact"]) for row in found.rows] == [(recipe, 1, True)]
    assert any("give a single prompt" in note for note in found.notes), "a batch is left out, with the reason"


def test_own_prompts_come_on_top_and_end_where_the_model_ends_them(tiny, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "The quick brown fox"}\nbroken\n{"prompt": "jumps", "max_new_tokens": 5}\n')
    found = run(tiny, tmp_path / "r", methods=DRAFTS[:1], workloads=[str(path)], temperatures=(0,), max_new_tokens=None)
    assert list(dict.fromkeys(row["task"] for row in found.rows)) == [*TEXTS, "mine.jsonl"]
    assert any("mine.jsonl" in note and "line 2" in note for note in found.notes)
    single, pair = (row for row in found.rows if row["task"] == "mine.jsonl")
    assert single["texts"] == 1 and pair["texts"] == 2 and pair["exact"], "prompts of different lengths in one batch"
    only = run(tiny, tmp_path / "o", methods=DRAFTS[:1], workloads=["code", str(path)], temperatures=(0,), batches=(1,))
    assert [row["task"] for row in only.rows] == ["code", "mine.jsonl"]


# --- notes, files


def test_a_method_that_lacks_something_is_a_note_unless_nothing_is_left(tiny, tmp_path: Path) -> None:
    import dataclasses

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needy(DraftMethod):
        """Test only."""

        id = "needy"
        paper = "none"

        def drafter(self, setting: Any) -> Drafter:
            self.require(False, "it needs a draft model: give model=PATH.")

    before = dict(_methods)
    try:
        register(Needy)
        found = run(tiny, tmp_path / "r", methods=None, workloads=["prose"])
        assert "needy" not in {row["method"] for row in found.rows} and "prompt_lookup" in {row["method"] for row in found.rows}
        assert sum("needy:16 was left out: needy: it needs a draft model" in note for note in found.notes) == 1
        with pytest.raises(LaconicError, match="needs a draft model"):
            run(tiny, tmp_path / "n", methods=["needy"])
    finally:
        _methods.clear()
        _methods.update(before)


def test_an_interrupted_run_goes_on_where_it_stopped(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, str]] = []
    real = module._Suite._measure

    def counted(self: Any, cell: Any, advance: Any) -> dict[str, Any]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((cell.key, cell.workload))
        return real(self, cell, advance)

    monkeypatch.setattr(module._Suite, "_measure", counted)
    options: dict[str, Any] = {"temperatures": (0,), "batches": (1,)}
    with pytest.raises(KeyboardInterrupt, match=r"3 of 6 cells are kept .* run the same command again"):
        run(tiny, tmp_path, **options)
    page = words((tmp_path / "index.html").read_text())
    assert "This run is not finished: 3 cells are measured" in page
    kept = (tmp_path / "results.jsonl").read_text()
    assert len(kept.splitlines()) == 3
    first = list(measured)
    measured[:] = []
    monkeypatch.setattr(module._Suite, "_measure", lambda self, cell, advance: real(self, cell, advance))
    found = run(tiny, tmp_path, **options)
    assert (tmp_path / "results.jsonl").read_text().startswith(kept) and len(found.rows) == 6
    assert first == [(row["recipe"], row["task"]) for row in found.rows[:3]]
    monkeypatch.setattr(module._Suite, "_measure", counted)
    run(tiny, tmp_path, **options)
    assert measured == [], "a finished run measures nothing"
    with pytest.raises(LaconicError, match="different run"):
        run(tiny, tmp_path, seed=1, **options)


# --- page and command line


def test_the_page_shows_every_method_setting_and_figure(report: module.DecodingReport) -> None:
    html = report.html.read_text(encoding="utf-8")
    page = words(html)
    for part in (*TEXTS, "temperature 0, batch 1", "temperature 1, batch 2", "exact in distribution", "prompt_lookup"):
        assert part in page
    assert "Prompt Lookup Decoding (Saxena, 2023)" in page and "Token Recycling" in page
    rows = re.search(r'<section id="table">(.*?)</section>', html, re.S)[1].count("<tr>") - 1
    assert rows == len(report.rows)
    assert html.count("<svg") == sum(bool(row["accepted"]) for row in report.rows)
    assert html.count('class="bar"') == 2 * len(report.rows)
    assert "http" not in re.sub(r"<meta[^>]*>", "", html.lower()).replace("http-equiv", ""), "it asks for nothing"


def test_bars_are_as_long_as_their_figures(report: module.DecodingReport) -> None:
    html = report.html.read_text(encoding="utf-8")
    section = re.search(r'<section id="forwards">(.*?)</section>', html, re.S)[1]
    bars = re.findall(r'--share: ([\d.]+)%; --one: ([\d.]+)%"><div>.*?</div><span>([\d.]+)</span>', section)
    assert len(bars) == len(report.rows)
    for share, one, value in bars:
        assert float(share) / float(one) == pytest.approx(float(value), abs=0.02)
    assert max(float(share) for share, _, _ in bars) == 100


def test_command_line(tiny_path: str, tmp_path: Path) -> None:
    arguments = ["compare", "--suite", "decoding", "--model", tiny_path, "--methods", "prompt_lookup", "--budgets", "3,5"]
    arguments += ["--samples", "1", "--max-new-tokens", "6", "--lengths", "30", "--temperatures", "0,0.7", "--batches", "1"]
    arguments += ["--task", "code,repetitive", "--output", str(tmp_path / "report")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("prompt_lookup")]
    assert [line[1:4] for line in lines] == [["3", "0", "1"], ["5", "0", "1"], ["3", "0.7", "1"], ["5", "0.7", "1"]]
    assert all(line[-1] == "yes" for line in lines[:2]) and "Report:" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 120
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    disk = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    assert found["rows"] == disk and len(disk) == 8 and found["run"]["suite"] == "decoding"
    assert found["report"].endswith("index.html")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "decoding", "--question", "after"], "--question"),
        (["--suite", "decoding", "--temperatures", "warm"], "--temperatures 'warm'"),
        (["--suite", "decoding", "--batches", "0"], "--batches"),
        (["--suite", "decoded"], "cards or decoding"),
        (["--temperatures", "0"], "go with --suite decoding"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(tiny_path: str, tmp_path: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["compare", "--model", tiny_path, "--output", str(tmp_path), "--quiet", *arguments])
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_ctrl_c_is_130(tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Suite, "_measure", interrupt)
    result = CliRunner().invoke(app, [
        "compare", "--suite", "decoding", "--model", tiny_path, "--methods", "prompt_lookup", "--quiet", "--lengths", "20",
        "--output", str(tmp_path / "r"),
    ])  # fmt: skip
    assert result.exit_code == 130 and "run the same command again" in result.stderr
