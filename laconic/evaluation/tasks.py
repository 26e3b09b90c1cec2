"""Tasks by name: built-in retrieval tasks, perplexity and long generation on a text, and a user's own JSONL file."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.errors import LaconicError, quote
from laconic.evaluation import picture_tasks, retrieval, template_tasks
from laconic.evaluation.examples import Example, Task
from laconic.evaluation.haystack import read_text, reference_text
from laconic.evaluation.prompts import TRIES, count_tokens
from laconic.evaluation.task_file import read_task

__all__ = ["Example", "Task", "load_task", "task_names"]

LENGTHS = (1024, 2048, 4096)
TEXT_TASKS = {"perplexity": LENGTHS, "long_generation": (512,)}
SHORTEST, LONGEST = 16, 1 << 24
SCORED_TOKENS = 64
TEXTS_PER_LENGTH = 3
GENERATED_TOKENS = 512
CHARACTERS = 16  # more than a token has on average in any tokenizer


def task_names() -> list[str]:
    """Names that ``load_task`` knows; those of ``TEXT_TASKS`` also as ``NAME:FILE``, and the path of a ``.jsonl`` file, come
    on top."""
    return [*retrieval.TASKS, *TEXT_TASKS, *picture_tasks.TASKS, *template_tasks.TASKS]


def load_task(
    name_or_path: str,
    tokenizer: Any,
    *,
    samples: int | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Task:
    """A task by its name (see ``task_names``), ``perplexity:FILE``, ``long_generation:FILE``, or a ``.jsonl`` file's path.

    Args:
        tokenizer: lengths count its tokens, special tokens included.
        samples: number of examples in all, spread evenly over the grid of the task; of a file, the first so many.
        lengths: prompt lengths in tokens; 1,024, 2,048 and 4,096 by default, and 512 where long texts are generated. A file
            brings its own.
        seed: the same seed gives the same examples.

    Raises:
        LaconicError: for an unknown name, an impossible setting, or a file that cannot be used.
    """
    name = str(name_or_path)
    if samples is not None and samples < 1:
        raise LaconicError(f"samples is {samples}: give 1 or more, or leave it out.")
    if name.endswith((".jsonl", ".ndjson")) and not name.startswith("perplexity:"):
        if lengths is not None:
            raise LaconicError("lengths goes with the built-in tasks: the prompts of a task file have their own.")
        return read_task(name, tokenizer, samples)
    if name in picture_tasks.TASKS:
        if lengths is not None:
            raise LaconicError(f"lengths goes with texts: {name} asks about pictures, which have their own.")
        return picture_tasks.make_task(name, samples, seed)
    if name in template_tasks.TASKS:
        if lengths is not None:
            raise LaconicError(f"lengths goes with texts: the questions of {name} have their own.")
        return template_tasks.make_task(name, samples, seed)
    base, _, argument = name.partition(":")
    chosen = _check_lengths(TEXT_TASKS.get(base, LENGTHS) if lengths is None else lengths)
    if name in retrieval.TASKS:
        metric = retrieval.TASKS[name][1]
        return Task(name, metric, retrieval.make_examples(name, tokenizer, chosen, samples, seed))
    if base in TEXT_TASKS:
        return _text_task(name, argument or None, tokenizer, chosen, samples, seed)
    raise LaconicError(_unknown(name))


def _check_lengths(lengths: Sequence[int]) -> list[int]:
    chosen = sorted(set(lengths))
    if not chosen:
        raise LaconicError("lengths is empty: give at least one prompt length in tokens.")
    for length in chosen:
        if not SHORTEST <= length <= LONGEST:
            raise LaconicError(f"A prompt length of {length} tokens is out of range: use {SHORTEST} to {LONGEST}.")
    return chosen


def _unknown(name: str) -> str:
    if Path(name).is_file():
        return f"The file {name} is no task: a task file is named .jsonl, a text is given as perplexity:{name}."
    near = difflib.get_close_matches(name.lower(), task_names(), n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(task_names())}, or a .jsonl file."
    return f"There is no task {quote(name)}: {hint}"


def _text_task(name: str, path: str | None, tokenizer: Any, lengths: Sequence[int], samples: int | None, seed: int) -> Task:
    """Stretches of a text of the wanted lengths.

    For perplexity the tokens after the middle of each are scored, given the rest. For long generation the dense model
    writes on from the stretch; every method is then forced along its text, and judged by its fidelity.
    """
    text = (reference_text() if path is None else read_text(path)).strip()
    # Only of a text that may be too short all tokens are counted: books are long.
    sample = text if len(text) < CHARACTERS * max(lengths) else text[:8000]
    total = counted = count_tokens(tokenizer, sample)
    if len(sample) < len(text):
        total = LONGEST
    if total < SHORTEST:
        raise LaconicError(f"The text file {path} has {total} tokens: a text task needs at least {SHORTEST}.")
    problems = [f"The text has {total} tokens, so the length {length} became {total}." for length in lengths if length > total]
    grid = [{"length": length} for length in dict.fromkeys(min(length, total) for length in lengths)]
    cells = retrieval.spread(grid, samples if samples is not None else TEXTS_PER_LENGTH * len(grid))
    scored, examples = name.startswith("perplexity"), []
    for i, cell in enumerate(cells):
        rng = random.Random(f"perplexity/{seed}/{i}")
        prompt = _stretch(tokenizer, text, cell["length"], len(sample) / counted, rng)
        limit = min(SCORED_TOKENS, cell["length"] // 2) if scored else GENERATED_TOKENS
        draw = None if scored else rng.randrange(1 << 31)
        examples.append(Example(prompt, max_new_tokens=limit, draw=draw, meta=dict(cell)))
    return Task(name, "perplexity" if scored else None, examples, problems)


def _stretch(tokenizer: Any, text: str, length: int, per_token: float, rng: random.Random) -> str:
    """Consecutive words from a random place of a text: ``length`` tokens, as closely as whole words allow.

    ``per_token``: how many characters a token of the text has on average.
    """
    size = per_token * length
    start = rng.randint(0, max(0, len(text) - int(1.2 * size)))
    if start:
        start = text.find(" ", start) + 1
    best, miss = "", length + 1
    for trial in range(TRIES):
        start = max(0, min(start, len(text) - int(size)))
        stop = start + math.ceil(size)
        if stop < len(text) and trial < TRIES // 2:  # later a giant word, such as a ruler, is cut
            stop = max(text.rfind(" ", start, stop), start + 1)
        stretch = text[start:stop].strip()
        count = count_tokens(tokenizer, stretch)
        if abs(count - length) < miss:
            best, miss = stretch, abs(count - length)
        if miss <= length // 200:
            break
        size *= length / max(1, count)
    return best
