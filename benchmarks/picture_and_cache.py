"""Fewer picture tokens and fewer tokens read, alone and together: ``python benchmarks/picture_and_cache.py > together.json``.

Asks the built-in model questions about scenes dense, with ``todre`` (a tenth of the picture enters the language model, and none
of it stays late in it once nobody looks), with ``tokenselect`` (a step reads some entries of the cache), and with both. The
recipes take turns at every question, so that what else the machine does meets them alike; ratios to dense are medians of the
ratios of single questions. Prints one JSON object: per recipe the share of right answers, milliseconds of the prompt (encoder
included) and of a further token, bytes that the cache holds and that a step reads, and all of these against dense.
``--clock cpu`` takes the process's own time, which says more where others use the machine (with one thread); ``--quick`` asks
two questions and writes few tokens, to see that it works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import laconic
from laconic.bench.run import machine
from laconic.evaluation.examples import Example
from laconic.evaluation.picture_tasks import make_task
from laconic.generation import Clock
from laconic.models.reading import read, text_side

RECIPES = ("dense", "todre:10% + withdraw", "tokenselect:32", "todre:10% + withdraw + tokenselect:32")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COSTS = ("prefill_ms", "step_ms", "bytes_kept", "bytes_read")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=24, help="written after each question, to time a step")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="the first one is what the others are compared with")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    samples, tokens = (2, 4) if options.quick else (options.samples, options.tokens)
    model, processor = laconic.load(options.model)
    rows: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in options.recipes}
    examples = make_task("shapes_vqa", samples, seed=0).examples
    for example in [examples[0], *examples]:  # the first question is asked twice: what is compiled then is not timed
        for recipe in options.recipes:
            rows[recipe].append(asked(model, processor, recipe, example, tokens, Times(options.clock)))
    rows = {recipe: found[1:] for recipe, found in rows.items()}
    first = rows[options.recipes[0]]
    summary = {recipe: summarise(found, first) for recipe, found in rows.items()}
    facts = {"samples": samples, "tokens": tokens, "clock": options.clock}
    print(json.dumps({**facts, "rows": summary, "machine": machine()}, indent=2))


class Times(Clock):
    """Notes when every token came, by one of ``CLOCKS``."""

    def __init__(self, clock: str) -> None:
        super().__init__(None)
        self._now = CLOCKS[clock]

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(self._now())


def asked(model: Any, processor: Any, recipe: str, example: Example, tokens: int, clock: Times) -> dict[str, Any]:
    """One question under one recipe: whether the answer is right, and what it took."""
    inputs = read(processor, example.prompt, example.pictures)
    with laconic.apply(model, recipe) as handle, torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
        stats = handle.stats()
        answer = model.generate(**inputs, max_new_tokens=example.max_new_tokens, do_sample=False)
    said = text_side(processor).decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    times = clock.times
    return {
        "right": said.split() == example.answer.split(),
        "written": ids[0, inputs["input_ids"].shape[1] :].tolist(),
        "prefill_ms": 1e3 * (times[1] - times[0]),
        "step_ms": 1e3 * statistics.median(b - a for a, b in itertools.pairwise(times[1:])),
        "bytes_kept": stats["bytes_kept"],
        "bytes_read": stats["bytes_read"],
    }


def summarise(rows: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and medians over the questions, and ratios to the first recipe's (above 1: less than there)."""
    return {
        "right": statistics.mean(row["right"] for row in rows),
        **{name: statistics.median(row[name] for row in rows) for name in COSTS},
        "less": {name: statistics.median(a[name] / b[name] for a, b in zip(first, rows, strict=True)) for name in COSTS},
        "same_first_token": statistics.mean(a["written"][0] == b["written"][0] for a, b in zip(first, rows, strict=True)),
    }


if __name__ == "__main__":
    main()
