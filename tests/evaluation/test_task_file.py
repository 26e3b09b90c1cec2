"""A user's own JSONL file: what a line may hold, and what happens to broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.errors import LaconicError
from laconic.evaluation.examples import Example, Task
from laconic.evaluation.tasks import load_task

GOOD = '{"prompt": "One and one?", "answer": "two"}'


class Letters:
    """A tokenizer with a token per character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def write(folder: Path, *lines: str | bytes | dict[str, Any]) -> str:
    path = folder / "mine.jsonl"
    encoded = [json.dumps(x) if isinstance(x, dict) else x for x in lines]
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in encoded))
    return str(path)


def read(folder: Path, *lines: str | bytes | dict[str, Any], samples: int | None = None) -> Task:
    return load_task(write(folder, *lines), Letters(), samples=samples)


def test_broken_lines_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    broken = [
        "{not json}", "[1, 2]", '"text"', "3", b'{"prompt": "\xff\xfe"}', "{}", '{"prompt": ""}', '{"prompt": "  "}',
        '{"prompt": 5}', '{"prompt": "x", "answer": {}}', '{"prompt": "x", "answer": []}',
        '{"prompt": "x", "answer": true}', '{"prompt": "x", "answer": ""}', '{"prompt": "x", "answer": ["a", null]}',
        '{"prompt": "x", "answer": "y", "max_new_tokens": 0}', '{"prompt": "x", "max_new_tokens": "9"}',
        '{"prompt": "x", "answer": "y", "metric": "contain"}', '{"prompt": "x", "pattern": "("}',
        '{"prompt": "x", "answer": "c", "choices": ["a", "b"], "metric": "choice"}',
        '{"prompt": "x", "answer": "c", "metric": "choice"}', '{"prompt": "x y", "question": "z"}',
        '{"context": "x"}', '{"question": "x"}', '{"prompt": "x", "context": "y"}', '{"prompt": "\\ud800"}',
        '{"prompt": "x", "answer": "y", "metric": "exact"}', "[" * 100_000, '{"prompt": "cut off',
    ]  # fmt: skip
    task = read(tmp_path, GOOD, *broken, "", GOOD.replace("One", "Eins"))
    assert [e.prompt for e in task.examples] == ["One and one?", "Eins and one?"]
    assert len(task.problems) == len(broken)
    for number, problem in enumerate(task.problems, 2):
        assert problem.startswith(f"line {number}: ") and "\n" not in problem and len(problem) < 250
    assert task.problems[0].startswith("line 2: not JSON: ") and "UTF-8" in task.problems[4]
    assert "use contains" in task.problems[16]


def test_fields(tmp_path: Path) -> None:
    task = read(tmp_path, {"prompt": "a text, a question", "answer": ["x", 7], "question": "a question", "id": 4})
    example = Example("a text, a question", ["x", "7"], None, "a question", 32, {"line": 1, "length": 18})
    assert task == Task("mine.jsonl", "contains", [example], [])
    (joined,) = read(tmp_path, {"context": "A text.", "question": "What?", "max_new_tokens": 3}).examples
    assert (joined.prompt, joined.question, joined.max_new_tokens) == ("A text.\nWhat?", "\nWhat?", 3)
    (split,) = read(tmp_path, {"context": "A text.", "prompt": "A text. What?"}).examples
    assert split.question == " What?"
    (long,) = read(tmp_path, {"prompt": "x", "answer": "y" * 500}).examples
    assert long.max_new_tokens > 500


@pytest.mark.parametrize(
    ("line", "metric", "answer"),
    [
        ({"answer": "y"}, "contains", "y"),
        ({"answer": "y", "metric": "exact"}, "exact", "y"),
        ({"answer": "y", "metric": "rouge_l"}, "rouge_l", "y"),
        ({"answer": "b", "choices": ["a", "b"]}, "choice", "b"),
        ({"answer": 2, "choices": [1, 2]}, "choice", "2"),
        ({"pattern": "y+$"}, "regex", "y+$"),
        ({"answer": "y+$", "metric": "regex"}, "regex", "y+$"),
        ({}, None, None),
    ],
)
def test_metric(tmp_path: Path, line: dict[str, Any], metric: str | None, answer: str | None) -> None:
    task = read(tmp_path, {"prompt": "x", **line})
    assert (task.metric, task.examples[0].answer) == (metric, answer)


def test_lines_without_answer_may_stand_among_others(tmp_path: Path) -> None:
    task = read(tmp_path, '{"prompt": "no answer"}', GOOD, '{"prompt": "none again"}')
    assert (task.metric, len(task.examples), task.problems) == ("contains", 3, [])


def test_misspelt_fields_are_named(tmp_path: Path) -> None:
    task = read(tmp_path, {"prompt": "x", "anwser": "y", "source": "z"})
    assert len(task.problems) == 1 and "did you mean 'answer'" in task.problems[0]
    assert len(task.examples) == 1 and task.metric is None


def test_samples_takes_the_first(tmp_path: Path) -> None:
    lines = [{"prompt": f"number {i}"} for i in range(9)]
    assert [e.prompt for e in read(tmp_path, *lines, samples=2).examples] == ["number 0", "number 1"]


def test_files_of_other_systems(tmp_path: Path) -> None:
    task = read(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r", GOOD + "\r", "")
    assert len(task.examples) == 2 and not task.problems


def test_unusable_files(tmp_path: Path) -> None:
    cases = {
        "is empty": write(tmp_path),
        "cannot be read": str(tmp_path / "missing.jsonl"),
    }
    for reason, path in cases.items():
        with pytest.raises(LaconicError, match=reason) as caught:
            load_task(path, Letters())
        assert "\n" not in str(caught.value)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(LaconicError, match="cannot be read"):
        load_task(str(tmp_path / "folder.jsonl"), Letters())
    with pytest.raises(LaconicError, match="is empty"):
        read(tmp_path, "", "  ", "")
    with pytest.raises(LaconicError, match=r"No line.*line 1: not JSON"):
        read(tmp_path, "{", "}")
    with pytest.raises(LaconicError, match="lengths"):
        load_task(write(tmp_path, GOOD), Letters(), lengths=[512])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_examples_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    task = read(folder, GOOD, data)
    assert task.examples[0].answer == "two" and all(p.startswith("line ") for p in task.problems)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(
    st.sampled_from(["prompt", "context", "question", "answer", "choices", "metric", "pattern", "max_new_tokens"]),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("choice"),
                 lambda inner: st.lists(inner, max_size=3), max_leaves=5),
))  # fmt: skip
def test_any_object_gives_an_example_or_a_problem(tmp_path_factory: pytest.TempPathFactory, line: dict) -> None:
    task = read(tmp_path_factory.mktemp("objects"), GOOD, line)
    assert len(task.examples) == 2 or task.problems
