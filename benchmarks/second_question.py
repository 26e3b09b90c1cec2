"""What a choice made for one question does to the next one about the same picture: ``python benchmarks/second_question.py``.

Asks the built-in model two questions about each scene in one conversation, dense and with methods that know the question, with
what they leave out gone (``rest=drop``) or parked (``rest=park``). Prints one JSON object: the share of right answers to the
first and to the second question, and milliseconds per turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

import laconic
from laconic.bench.run import machine
from laconic.evaluation.picture_tasks import held_out
from laconic.models.reading import read
from laconic.models.scenes import TYPES, Question, Scene, ask, make_scene

METHODS = ("explain_prune", "mmtok", "flashvlm", "design(score=text)")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--budget", default="5.6%")
    parser.add_argument("--samples", type=int, default=60)
    options = parser.parse_args()
    model, processor = laconic.load(options.model)
    asked = [conversation(seed) for seed in range(options.samples)]
    recipes = ["dense"]
    for name in METHODS:
        bare, _, parameters = name.rstrip(")").partition("(")
        recipes += [f"{bare}({', '.join(filter(None, [parameters, f'rest={r}']))}):{options.budget}" for r in ("drop", "park")]
    rows = {recipe: measure(model, processor, recipe, asked) for recipe in recipes}
    print(json.dumps({"budget": options.budget, "samples": options.samples, "rows": rows, "machine": machine()}, indent=2))


def conversation(seed: int) -> tuple[Scene, list[Question]]:
    """A held-out scene and two questions of different types about it."""
    rng = np.random.default_rng(held_out(seed))
    while True:
        scene = make_scene(rng)
        found = [q for kind in rng.permutation(TYPES) if (q := ask(scene, rng, str(kind)))]
        if len(found) >= 2:
            return scene, found[:2]


def measure(model: Any, processor: Any, recipe: str, asked: list[tuple[Scene, list[Question]]]) -> dict[str, Any]:
    """Share of right answers and median milliseconds of both turns."""
    right, spent = np.zeros((len(asked), 2)), np.zeros((len(asked), 2))
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        for number, (scene, questions) in enumerate(asked):
            cache, ids = handle.cache(), None
            for turn, question in enumerate(questions):
                inputs = read(processor, question.text, [scene]) if ids is None else further(processor, ids, question)
                begun = time.perf_counter()
                ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
                spent[number, turn] = 1e3 * (time.perf_counter() - begun)
                said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right[number, turn] = said.split() == question.answer.split()
    turns = ("first", "second")
    return {
        "right": dict(zip(turns, right.mean(0).tolist(), strict=True)),
        "ms": {turn: statistics.median(spent[:, i].tolist()) for i, turn in enumerate(turns)},
    }


def further(processor: Any, ids: torch.Tensor, question: Question) -> dict[str, torch.Tensor]:
    """The inputs of a later turn: the conversation so far and the next question."""
    more = processor.tokenizer(question.text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, more], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


if __name__ == "__main__":
    main()
