"""Whether HISA finds the tokens of a flat search in a real model: ``python benchmarks/hisa_overlap.py --model needle``.

At each of the last tokens of a prompt, in every layer and KV head, the set that ``hisa`` chooses is laid beside the one that the
same scores give without blocks. JSON on stdout, a line per case: the intersection over the union of the two sets (``iou``; tokens
that both read in any case do not count) as mean, tenth percentile, mean per layer and share of sets above 0.99; the mean that the
best possible choice of as many blocks would reach (``iou_best_blocks``); and the attention that each set holds over that of as
many best tokens (``mass``, ``flat_mass``).
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import torch

import laconic
from laconic.attention.search import candidate_blocks
from laconic.bench.suite.scoring_pareto import Layers, best_attention, decode_steps, recall, seen_layers
from laconic.kernels.blocks import KINDS
from laconic.recipe import Recipe

FLAT = "coarse_to_fine(block=0, int8=false, exact=true)"
TASKS = {"needle": ("needle", "perplexity"), "story": ("perplexity",)}  # what each model was made for, and running text
ONE_IN = (16, 64)  # 2,048 tokens of 32,768 and of 131,072, as published
BLOCKS, OVERSAMPLE = (8, 32, 64, 128), (4, 8)


def settings() -> list[str]:
    """Recipes of HISA without their budget; the first has the defaults."""
    grid = itertools.product(KINDS, BLOCKS, OVERSAMPLE)
    return ["hisa", *(f"hisa(block={block}, oversample={over}, representative={kind})" for kind, block, over in grid)]


def marks(slots: torch.Tensor, n: int, ends: tuple[int, int]) -> torch.Tensor:
    """Which of ``n`` slots are among ``slots`` (1, kv_heads, k), -1 for none: bool ``(kv_heads, n)``.

    The ``ends``, so many first and newest, are left out.
    """
    mark = torch.zeros(slots.shape[1], n + 1, dtype=torch.bool).scatter_(1, torch.where(slots < 0, n, slots)[0], True)[:, :n]
    mark[:, : ends[0]] = mark[:, n - ends[1] :] = False
    return mark


def overlap(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Intersection over union of two sets of marks, ``(kv_heads,)``."""
    return (found & wanted).sum(-1) / (found | wanted).sum(-1).clamp(min=1)


def ceiling(wanted: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """The overlap of a search that scores ``count`` blocks and no other: those that hold most of ``wanted``, ``(kv_heads,)``."""
    held = torch.nn.functional.pad(wanted, (0, -wanted.shape[1] % block)).unflatten(1, (-1, block)).sum(-1)
    share = held.topk(min(count, held.shape[1])).values.sum(-1) / held.sum(-1).clamp(min=1)
    return share / (2 - share)  # both sets are of one size


def measure(texts: list[Layers], one_in: int, recipes: list[str], steps: int) -> list[dict[str, Any]]:
    """A row for each recipe, over the last ``steps`` tokens of all texts."""
    budget = texts[0][0][1].shape[2] // one_in
    flat, *methods = (Recipe.parse(f"{recipe}:{budget}").methods[0] for recipe in (FLAT, *recipes))
    ends, layers = (flat.sinks, flat.recent), len(texts[0])
    sets: dict[str, list[torch.Tensor]] = {recipe: [] for recipe in recipes}
    best_sets: dict[str, list[torch.Tensor]] = {recipe: [] for recipe in recipes}
    mass: dict[str, list[float]] = {recipe: [] for recipe in (FLAT, *recipes)}
    for layer, call in decode_steps(texts, steps):
        best, wanted = best_attention(layer, call, budget), flat.select(layer, call).indices
        mass[FLAT].append(recall(wanted, *best))
        wanted = marks(wanted, layer.n, ends)
        for recipe, method in zip(recipes, methods, strict=True):
            found = method.select(layer, call).indices
            sets[recipe].append(overlap(marks(found, layer.n, ends), wanted))
            blocks = candidate_blocks(torch.tensor(budget), torch.tensor(int(budget * method.oversample)), method.block)
            best_sets[recipe].append(ceiling(wanted, method.block, int(blocks)))
            mass[recipe].append(recall(found, *best))
    rows = []
    for recipe in recipes:
        iou = torch.stack(sets[recipe])  # (steps * layers, kv_heads), layer by layer in every step
        rows.append({
            "recipe": recipe, "budget": budget, "one_in": one_in, "iou": float(iou.mean()), "iou_p10": float(iou.quantile(0.1)),
            "iou_best_blocks": float(torch.stack(best_sets[recipe]).mean()),
            "iou_layers": [float(part.mean()) for part in iou.unflatten(0, (-1, layers)).unbind(1)],
            "above_99": float((iou >= 0.99).float().mean()), "sets": iou.numel(),
            "mass": sum(mass[recipe]) / len(mass[recipe]), "flat_mass": sum(mass[FLAT]) / len(mass[FLAT]),
        })  # fmt: skip
    return rows


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(TASKS), default="needle")
    parser.add_argument("--length", type=int, help="tokens of a prompt (the model's limit)")
    parser.add_argument("--text", help="a text file in place of the built-in tasks")
    parser.add_argument("--samples", type=int, default=3, help="prompts of each task (3)")
    parser.add_argument("--steps", type=int, default=8, help="last tokens of each prompt that are looked at (8)")
    arguments = parser.parse_args()
    length = arguments.length or laconic.load(arguments.model)[0].config.max_position_embeddings
    for task in (f"perplexity:{arguments.text}",) if arguments.text else TASKS[arguments.model]:
        with torch.no_grad():
            texts = seen_layers(arguments.model, task, length, arguments.samples)
        for one_in in ONE_IN:
            rows = measure(texts, one_in, settings(), arguments.steps)
            case = {"model": arguments.model, "task": task, "tokens": [layers[0][1].shape[2] for layers in texts]}
            print(json.dumps(case | {"rows": rows}), flush=True)


if __name__ == "__main__":
    main()
