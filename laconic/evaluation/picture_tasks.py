"""Questions about rendered scenes."""

from __future__ import annotations

import itertools

from laconic.evaluation.examples import Example, Task
from laconic.models.scenes import TYPES, examples

SAMPLES = 60
TASKS = {
    "shapes_vqa": "questions about colour, count, position, comparison, reading and existence in turn",
    "pope": "is there such a thing? Half of the answers are no, most of these about a colour and a shape that are there apart",
}


def make_task(name: str, samples: int | None, seed: int) -> Task:
    """Scenes of one ``seed``, each with one question. ``samples``: how many, 60 by default."""
    count = samples if samples is not None else SAMPLES
    type_ = "existence" if name == "pope" else None
    made = [
        Example(
            prompt=question.text, answer=question.answer, question=question.text, max_new_tokens=4, pictures=(scene,),
            meta={"type": question.type},
        )
        for scene, question in itertools.islice(examples(held_out(seed), type_), count)
    ]  # fmt: skip
    return Task(name, "exact", made)


def held_out(seed: int) -> int:
    """A seed that training, which counts from 0 on, does not reach."""
    return 10_000_000 + seed


__all__ = ["TASKS", "TYPES", "make_task"]
