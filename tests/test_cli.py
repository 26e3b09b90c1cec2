"""The command line: JSON that is JSON, sentences instead of tracebacks, and exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import laconic
from laconic.cli import _split, app
from laconic.errors import LaconicError
from laconic.evaluation import compare as compare_module

runner = CliRunner()
PROMPT = {"prompt": "The quick brown fox jumps over the lazy dog and", "answer": "x", "max_new_tokens": 3}


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "_write_page", lambda directory: directory / "index.html")


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(PROMPT) + "\n")
    return str(path)


def compare(*arguments: object):
    return runner.invoke(app, ["compare", "--quiet", "--budgets", "24", "--methods", "streaming", *map(str, arguments)])


def assert_one_sentence(result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and "Traceback" not in result.output
    for word in words:
        assert word in lines[0]


def test_compare_json(tiny_path: str, task: str, tmp_path: Path) -> None:
    result = compare("--model", tiny_path, "--task", task, "--output", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["recipe"] for row in found["rows"]] == ["dense", "streaming:24"]
    lines = (tmp_path / "report" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["rows"]
    assert found["report"].endswith("index.html") and found["run"]["command"].split()[0] == "laconic"


def test_compare_table(tiny_path: str, task: str, tmp_path: Path) -> None:
    arguments = ["compare", "--model", tiny_path, "--task", task, "--output", str(tmp_path / "report")]
    result = runner.invoke(app, [*arguments, "--methods", "streaming, tova", "--budgets", "24,50%"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    shown = [line[:2] for line in lines if line and line[0] in ("dense", "streaming", "tova")]
    assert shown == [["dense", "100%"], ["streaming", "24"], ["streaming", "50%"], ["tova", "24"], ["tova", "50%"]]
    assert "Report:" in result.stdout and max(map(len, result.stdout.splitlines()[:-1])) <= 120


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/model"], ["/no/such/model"]),
        (["--methods", "tokenselct"], ["did you mean 'tokenselect'"]),
        (["--budgets", "0"], ["Budget"]),
        (["--budgets", "-5"], ["Budget"]),
        (["--budgets", "150%"], ["Budget"]),
        (["--budgets", "ten"], ["Budget", "ten"]),
        (["--budgets", ","], ["empty list"]),
        (["--lengths", "10,x"], ["--lengths"]),
        (["--question", "later"], ["question"]),
        (["--task", "no-such-task"], ["no-such-task"]),
        (["--task", "missing.jsonl"], ["missing.jsonl"]),
        (["--output", "/proc/laconic"], ["/proc/laconic"]),
        (["--samples", "0"], ["samples"]),
    ],
)
def test_bad_input(tiny_path: str, task: str, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    options = {"--model": tiny_path, "--task": task, "--output": str(tmp_path / "report")}
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert_one_sentence(compare(*[part for pair in options.items() for part in pair]), *words)


def test_a_model_that_is_no_causal_lm(tmp_path: Path, task: str) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    assert_one_sentence(compare("--model", tmp_path / "vit", "--task", task, "--output", tmp_path / "report"), "vit")


@pytest.mark.parametrize("text", ["", "\n\n", "not json\n", '{"answer": "no prompt"}\n'])
def test_a_task_file_without_examples(tiny_path: str, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    result = compare("--model", tiny_path, "--task", tmp_path / "bad.jsonl", "--output", tmp_path / "report")
    assert_one_sentence(result, "bad.jsonl")


def test_a_broken_line_is_reported_with_its_number_and_the_rest_goes_on(tiny_path: str, tmp_path: Path) -> None:
    task = tmp_path / "mixed.jsonl"
    task.write_text(f"{json.dumps(PROMPT)}\n{{broken\n{json.dumps(PROMPT)}\n")
    result = compare("--model", tiny_path, "--task", task, "--output", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"][0]["examples"] == 2
    assert "line 2" in result.stderr


def test_different_runs_do_not_mix(tiny_path: str, task: str, tmp_path: Path) -> None:
    arguments = ["--model", tiny_path, "--task", task, "--output", tmp_path / "report"]
    assert compare(*arguments).exit_code == 0
    before = (tmp_path / "report" / "results.jsonl").read_bytes()
    assert_one_sentence(compare(*arguments, "--seed", "1"), "different run", "--overwrite")
    assert (tmp_path / "report" / "results.jsonl").read_bytes() == before
    assert compare(*arguments, "--seed", "1", "--overwrite").exit_code == 0


def test_disk_full(tiny_path: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.write, []

    def full(file: int, data: bytes) -> int:
        if b'"recipe"' in data:
            calls.append(data)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    monkeypatch.setattr("laconic.evaluation.results.os.write", full)
    arguments = ["--model", tiny_path, "--task", task, "--output", tmp_path / "report"]
    assert_one_sentence(compare(*arguments), "No space left", "1 finished cells are kept")
    monkeypatch.undo()
    monkeypatch.setattr(compare_module, "_write_page", lambda directory: directory / "index.html")
    assert compare(*arguments).exit_code == 0
    assert len((tmp_path / "report" / "results.jsonl").read_text().splitlines()) == 2


def test_ctrl_c_is_130_and_says_how_to_go_on(tiny_path: str, task: str, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("laconic.evaluation.measure.measure_cell", interrupt)
    result = compare("--model", tiny_path, "--task", task, "--output", tmp_path / "report")
    assert result.exit_code == 130 and "run the same command again" in result.stderr


def test_debug_shows_the_traceback_and_a_bug_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(compare_module, "compare", broken)
    plain, debug = compare(), compare("--debug")
    assert plain.exit_code == debug.exit_code == 1
    assert plain.stderr.strip() == "Unexpected ZeroDivisionError: by zero (run with --debug to see where)"
    assert "Traceback" in debug.stderr


def test_a_methods_page_suggests_recipes_that_work() -> None:
    for name in ("tokenselect", "zerotuning"):
        page = runner.invoke(app, ["methods", name]).stdout
        suggested = page.split("Recipe: ")[1].replace("\n", " ").split(" or ")
        assert len(suggested) == 2 and [laconic.Recipe.parse(text.strip()).methods[0].id for text in suggested] == [name] * 2


def test_methods_json_lists_the_catalogue() -> None:
    result = runner.invoke(app, ["methods", "--json"])
    rows = json.loads(result.stdout)
    assert {"dense", "random", "streaming", "h2o", "tokenselect"} <= {row["id"] for row in rows}
    assert all({"id", "stage", "paper", "needs", "guarantee", "parameters"} <= row.keys() for row in rows)
    one = json.loads(runner.invoke(app, ["methods", "h2o", "--json"]).stdout)
    assert one == next(row for row in rows if row["id"] == "h2o")


def test_methods_for_people() -> None:
    table = runner.invoke(app, ["methods"])
    assert table.exit_code == 0 and "tokenselect" in table.stdout and "streaming" in table.stdout
    detail = runner.invoke(app, ["methods", "tokenselect"])
    assert detail.exit_code == 0 and "budget" in detail.stdout and "Paper:" in detail.stdout
    assert_one_sentence(runner.invoke(app, ["methods", "h20"]), "did you mean 'h2o'")


def test_generate_json_from_argument_and_from_standard_input(tiny_path: str) -> None:
    arguments = ["generate", "--model", tiny_path, "--method", "tokenselect:24", "--max-new-tokens", "4", "--json"]
    found = json.loads(runner.invoke(app, [*arguments, "The quick brown fox jumps"]).stdout)
    assert found["tokens"] <= 4 and found["prompt_tokens"] == 25 and found["method"] == "tokenselect:24"
    assert found["prefill_s"] > 0 and found["stats"]["bytes_kept"] > 0
    piped = json.loads(runner.invoke(app, arguments, input="The quick brown fox jumps").stdout)
    assert piped["text"] == found["text"]


def test_generate_streams_text_to_stdout_and_figures_to_stderr(tiny_path: str) -> None:
    arguments = ["generate", "--model", tiny_path, "--max-new-tokens", "4", "The quick brown fox"]
    shown, data = runner.invoke(app, arguments), runner.invoke(app, [*arguments, "--json"])
    assert shown.stdout.rstrip("\n") == json.loads(data.stdout)["text"].rstrip("\n")
    assert "prefill" in shown.stderr and "prefill" not in shown.stdout


def test_generate_shows_what_is_drafted_and_accepted(tiny_path: str) -> None:
    arguments = ["generate", "--model", tiny_path, "--max-new-tokens", "12", "The quick brown fox"]
    drafted = [*arguments, "--draft", "prompt_lookup:4", "--show-tree"]
    shown, plain = runner.invoke(app, drafted), runner.invoke(app, [*arguments, "--json"])
    assert "accepted" in shown.stdout and "tokens per forward" in shown.stderr and "plain decoding" in shown.stderr
    assert "exact in distribution" in shown.stderr
    found = json.loads(runner.invoke(app, [*arguments, "--draft", "prompt_lookup:4", "--json"]).stdout)
    assert found["text"] == json.loads(plain.stdout)["text"]
    assert found["method"] == "prompt_lookup:4" and sum(found["accepted"]) == found["forwards"] - 1


@pytest.mark.parametrize(
    ("arguments", "text", "word"),
    [
        (["--method", "nothing:8", "hello"], None, "nothing"),
        ([], "", "empty"),
        (["--chat", "hello"], None, "chat template"),
        ([""], None, "empty"),
        (["--show-tree", "hello"], None, "--draft"),
        (["--draft", "tokenselect:24", "hello"], None, "drafts nothing"),
        (["--top-p", "0", "hello"], None, "top_p"),
        (["--draft", "prompt_lookup", "--method", "h2o:24", "hello"], None, "once=true"),
    ],
)
def test_generate_refuses(tiny_path: str, arguments: list[str], text: str | None, word: str) -> None:
    assert_one_sentence(runner.invoke(app, ["generate", "--model", tiny_path, *arguments], input=text), word)


def test_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.loads(runner.invoke(app, ["bench", "--list", "--json"]).stdout)
    assert {"dense_decode", "import_time"} <= {row["name"] for row in listed}
    assert_one_sentence(runner.invoke(app, ["bench", "dense_decod"]), "did you mean 'dense_decode'")

    def measured(name: str, quick: bool = False) -> dict:
        if name == "column_sums":
            raise LaconicError("too little memory")
        ratio = 1.0 if name == "dense_decode" else 9.0
        return {
            "name": name,
            "ratio": ratio,
            "target": 8,
            "met": ratio > 8,
            "ours": 1,
            "reference": ratio,
            "unit": "ms",
        }

    monkeypatch.setattr("laconic.bench.run.run_benchmark", measured)
    assert json.loads(runner.invoke(app, ["bench", "decode_step", "--json"]).stdout)["ratio"] == 9.0
    everything = runner.invoke(app, ["bench"])
    assert everything.exit_code == 0 and "column_sums did not run: too little memory" in everything.stderr
    assert everything.stdout.splitlines()[-1] == "Short of the target: dense_decode, column_sums."
    assert [row["name"] for row in json.loads(runner.invoke(app, ["bench", "--json"]).stdout)] == [
        row["name"] for row in listed
    ]


def test_usage_errors_exit_2() -> None:
    assert runner.invoke(app, ["compare", "--no-such-option"]).exit_code == 2
    assert runner.invoke(app, ["no-such-command"]).exit_code == 2


@pytest.mark.parametrize("command", ["compare", "tune", "generate", "methods", "bench"])
def test_help_teaches_by_example(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0 and f"laconic {command}" in result.stdout.split("Examples")[1]


def test_lists_are_split_outside_parentheses() -> None:
    assert _split("a(x=1, y=2):8, b") == ["a(x=1, y=2):8", "b"]
    assert _split(None) is None


def test_python_m_laconic_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "laconic", "compare", "--budgets", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
