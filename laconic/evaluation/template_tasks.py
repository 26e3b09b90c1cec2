"""Questions with one exact answer that the built-in diffusion models were trained on the like of."""

from __future__ import annotations

import itertools

from laconic.evaluation.examples import Example, Task
from laconic.models.templates import questions

SAMPLES = 90
NEW_TOKENS = 96  # the longest answers have 77, and an end token
TASKS = {"templates": "copy, reverse, sort, add, look up, spell, count and repeat, in turn; none of them was trained on"}


def make_task(name: str, samples: int | None, seed: int) -> Task:
    """Held-out questions of one ``seed``. ``samples``: how many, 90 by default."""
    count = samples if samples is not None else SAMPLES
    made = [
        Example(prompt=q.prompt, answer=q.answer.strip(), max_new_tokens=NEW_TOKENS, meta={"kind": q.kind})
        for q in itertools.islice(questions(seed, held_out=True), count)
    ]
    return Task(name, "exact", made)
