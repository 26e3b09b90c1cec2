"""Real photographs through a built-in model that sees: ``python benchmarks/photographs.py > photographs.json``.

    pip install 'laconic[photos]'

Two things that depend on what a picture shows. How much sooner the first token comes with a ninth of a photograph's tokens, under
methods before the language model and between its layers, against the model without laconic. And how long every greedy rule takes
to pick a tenth of 2,880 tokens, those of a photograph as a whole and of its four quarters, against the formulas in plain torch.
On every photograph they take turns; ratios are of its medians, and of all photographs' ratios the median, the least and the
largest are given. Prints one JSON object. ``--quick`` takes one photograph and few methods, to see that it works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

import laconic
from laconic.bench.figure import interleave, milliseconds
from laconic.bench.run import machine
from laconic.bench.suite.greedy_selection import RULES, Case
from laconic.models.reading import read
from laconic.vision.photos import PHOTOS, photo_path

METHODS = (
    "random_prune", "vtc_cls", "hiprune", "visionzip", "divprune", "idpruner", "todre", "mmtok", "dart", "tome", "flowcut",
    "fastv", "pyramiddrop",
)  # fmt: skip
QUESTION = "what colour is the circle ?"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--budget", default="11.1%", help="for the methods; the rules pick a tenth")
    parser.add_argument("--photos", nargs="+", choices=list(PHOTOS), default=list(PHOTOS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    methods, photos, repeats = METHODS, options.photos, options.repeats
    if options.quick:
        methods, photos, repeats = METHODS[:2], photos[:1], 1
    model, processor = laconic.load(options.model)
    answers, picks = [], []
    for name in photos:
        with Image.open(photo_path(name)) as opened:
            photo = opened.convert("RGB")
        answers.append(first_token(model, read(processor, QUESTION, [photo]), methods, options.budget, repeats))
        picks.append(choices(tokens_of(model, processor, photo), repeats))
    print(json.dumps({
        "photos": photos, "budget": options.budget, "repeats": repeats,
        "first_token": {name: spread([row[name] for row in answers]) for name in methods},
        "choice": {rule: {key: spread([row[rule][key] for row in picks]) for key in picks[0][rule]} for rule in RULES},
        "machine": machine(),
    }, indent=2))  # fmt: skip


@torch.no_grad()
def first_token(
    model: Any, inputs: dict[str, torch.Tensor], methods: Sequence[str], budget: str, repeats: int
) -> dict[str, float]:
    """How many times sooner than stock a forward of the prompt is done under each method."""
    inside = {}
    for name in methods:
        inside[name] = laconic.apply(model, f"{name}:{budget}")
        inside[name].remove()  # until its turn

    def forward(_: int) -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    ms = milliseconds(interleave(dict.fromkeys(("stock", *methods), forward), repeats=repeats, inside=inside))
    return {name: ms["stock"] / ms[name] for name in methods}


@torch.no_grad()
def tokens_of(model: Any, processor: Any, photo: Image.Image) -> Case:
    """The tokens of a photograph and of its quarters, which the class token's attention makes important."""
    width, height = photo.size
    across, down = (0, width // 2, width), (0, height // 2, height)
    quarters = [photo.crop((across[x], down[y], across[x + 1], down[y + 1])) for y in (0, 1) for x in (0, 1)]
    with laconic.apply(model, "design(score=salience):50%") as handle:
        model(**read(processor, QUESTION, [photo, *quarters]))
        seen = handle.entry.pictures
    importance = torch.cat([picture.salience() for picture in seen])
    return Case.of(torch.cat([picture.features for picture in seen]), importance, torch.Generator().manual_seed(0))


def choices(case: Case, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every rule, how many times longer its formulas take, the share of tokens that both pick, and how many they
    pick before they differ."""
    steps: dict[str, Callable[[int], object]] = {}
    for name, (ours, formulas) in RULES.items():
        steps |= {name: lambda _, f=ours: f(case), f"{name} formulas": lambda _, f=formulas: f(case)}
    ms, found = milliseconds(interleave(steps, repeats=repeats)), {}
    for name, (ours, formulas) in RULES.items():
        picked, expected = ours(case), formulas(case)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(picked, expected, strict=True))
        found[name] = {
            "ms": ms[name],
            "ratio": ms[f"{name} formulas"] / ms[name],
            "same": len({*picked} & {*expected}) / case.count,
            "alike": sum(1 for _ in alike),
        }
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


if __name__ == "__main__":
    main()
