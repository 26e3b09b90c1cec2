"""A user's own task: a JSONL file with one prompt a line."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from laconic.errors import LaconicError, quote
from laconic.evaluation.examples import Example, Task
from laconic.evaluation.metrics import TEXT_METRICS, score
from laconic.evaluation.prompts import count_tokens
from laconic.models.reading import open_picture

METRICS = (*TEXT_METRICS, "choice")
FIELDS = ("prompt", "context", "question", "answer", "choices", "metric", "pattern", "max_new_tokens", "image", "images")
NEW_TOKENS = 32
SPARE_TOKENS = 16


class _Broken(Exception):
    """What is wrong with a line."""


def read_task(path: str | Path, tokenizer: Any, samples: int | None = None) -> Task:
    """The task in a JSONL file. Fields of a line:

    ``prompt``, or ``context`` and ``question`` (joined to the prompt); ``question``: the end of the prompt;
    ``answer``: text or a list of texts; ``pattern``: a regular expression in its place; ``choices``: a list of texts;
    ``metric``: exact, contains, regex, choice or rouge_l, one for the whole file (by default choice where there are
    choices, regex where there is a pattern, else contains); ``max_new_tokens``; ``image``, or ``images`` as a list: paths of
    pictures, from the folder of the file on.

    ``samples`` takes the first so many. Lines that cannot be used are named in ``problems`` and left out. Raises
    LaconicError for a file that is missing, unreadable, empty or without a single usable line.
    """
    path = Path(path)
    examples: list[Example] = []
    problems: list[str] = []
    metric: str | None = None
    count = 0
    for number, raw in enumerate(_read_lines(path), 1):
        if not raw.strip():
            continue
        count += 1
        try:
            fields = _parse(raw)
            problems += [f"line {number}: {hint}" for hint in _misspelt(fields)]
            example, own = _example(fields, tokenizer, number, path.parent)
            if own and metric and own != metric:
                raise _Broken(f"its metric is {own}, that of the lines before is {metric}; use one per file")
        except _Broken as problem:
            problems.append(f"line {number}: {problem}")
            continue
        metric = metric or own
        examples.append(example)
        if samples is not None and len(examples) == samples:
            break
    if not count:
        raise LaconicError(f'The task file {path} is empty: give at least one line such as {{"prompt": "..."}}.')
    if not examples:
        raise LaconicError(f"No line of the task file {path} can be used: {problems[0]}.")
    return Task(path.name, metric, examples, problems)


def _read_lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LaconicError(f"The task file {path} cannot be read ({error.strerror or error}): check the path.") from error
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Broken(f"not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise _Broken(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _Broken("not JSON: nested too deeply") from None
    except ValueError as error:  # e.g. an integer with too many digits
        raise _Broken(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _Broken('not an object: write {"prompt": "..."}')
    return fields


def _misspelt(fields: dict[str, Any]) -> list[str]:
    """Unknown fields that look like a known one; all others are nobody's business."""
    hints = []
    for name in fields:
        near = [] if name in FIELDS else difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.75)
        if near and near[0] not in fields:
            hints.append(f"the unknown field {quote(name)} is ignored; did you mean '{near[0]}'?")
    return hints


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise _Broken(f"'{name}' is not a text")
    # JSON can escape half of a surrogate pair, which no tokenizer takes.
    if value is not None and any("\ud800" <= char <= "\udfff" for char in value):
        raise _Broken(f"'{name}' holds half a surrogate pair")
    return value


def _texts(fields: dict[str, Any], name: str) -> list[str] | None:
    """A text, a number or a list of them, as a list of texts."""
    value = fields.get(name)
    if value is None:
        return None
    entries = value if isinstance(value, list) else [value]
    if not entries or any(isinstance(v, bool) or not isinstance(v, (str, int, float)) for v in entries):
        raise _Broken(f"'{name}' is neither a text nor a list of texts")
    if any(isinstance(v, str) and not v.strip() for v in entries):
        raise _Broken(f"'{name}' is empty")
    return [str(v) for v in entries]


def _prompt(fields: dict[str, Any]) -> tuple[str, str | None]:
    prompt, context, question = (_text(fields, name) for name in ("prompt", "context", "question"))
    if prompt is None:
        if context is None or question is None:
            raise _Broken("no 'prompt' (nor 'context' and 'question')")
        if context and not context[-1].isspace() and not question[:1].isspace():
            question = "\n" + question
        prompt = context + question
    if not prompt.strip():
        raise _Broken("the prompt is empty")
    if question is None and context is not None:
        if not prompt.startswith(context):
            raise _Broken("the prompt does not begin with the context")
        question = prompt[len(context) :]
    if question and not prompt.endswith(question):
        raise _Broken("the prompt does not end with the question")
    return prompt, question or None


def _metric(fields: dict[str, Any], answers: list[str] | None, pattern: str | None) -> str | None:
    metric = _text(fields, "metric")
    if metric is not None and metric not in METRICS:
        near = difflib.get_close_matches(metric.lower(), METRICS, n=1)
        raise _Broken(f"no metric {quote(metric)}: use {near[0] if near else ', '.join(METRICS)}")
    if pattern is not None:
        if metric not in (None, "regex"):
            raise _Broken(f"'pattern' goes with the metric regex, not {metric}")
        return "regex"
    if answers is None:
        return None
    return metric or ("choice" if fields.get("choices") else "contains")


def _pictures(fields: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    """Paths of a line's pictures, which have to be there and to be pictures."""
    if "image" in fields and "images" in fields:
        raise _Broken("both 'image' and 'images': use one of them")
    given = fields.get("images", fields.get("image"))
    given = given if isinstance(given, list) else [] if given is None else [given]
    paths = []
    for entry in given:
        if not isinstance(entry, str) or not entry.strip():
            raise _Broken("'image' is no path of a picture")
        path = folder / entry
        try:
            open_picture(path)
        except LaconicError as error:
            raise _Broken(str(error).rstrip(".")) from None
        paths.append(path)
    return tuple(paths)


def _example(fields: dict[str, Any], tokenizer: Any, number: int, folder: Path) -> tuple[Example, str | None]:
    """The example of a line, and its metric (None if nothing says what is right)."""
    prompt, question = _prompt(fields)
    pattern, answers, choices = _text(fields, "pattern"), _texts(fields, "answer"), _texts(fields, "choices")
    metric = _metric(fields, answers, pattern)
    if metric == "regex":
        answers = [pattern] if pattern is not None else answers
        for entry in answers or []:
            try:
                re.compile(entry)
            except re.error as error:
                raise _Broken(f"{quote(entry)} is not a regular expression ({error})") from None
    elif metric == "choice":
        try:
            score(metric, "", answers or [], choices)
        except LaconicError as error:
            raise _Broken(str(error).rstrip(".")) from None
    limit = fields.get("max_new_tokens")
    if limit is None:
        needed = [] if metric == "regex" else [count_tokens(tokenizer, a, special=False) for a in answers or []]
        limit = max([NEW_TOKENS, *(n + SPARE_TOKENS for n in needed)])
    elif isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise _Broken("'max_new_tokens' is not a whole number of 1 or more")
    answer = answers[0] if answers and len(answers) == 1 else answers
    length = count_tokens(tokenizer, prompt)
    meta = {"line": number, "length": length}
    return Example(prompt, answer, choices, question, limit, meta, pictures=_pictures(fields, folder)), metric
