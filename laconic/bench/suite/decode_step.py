"""A whole decode step of a model: linear layers, cache and attention, against the same model without laconic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from laconic.bench.figure import Figure, Say, interleave, milliseconds
from laconic.bench.llama_slice import build_slice, cache_argument, cache_bytes, fill, stock_cache, weight_bytes
from laconic.hooks import apply

GOAL = ">= 3x at 32,768 tokens and >= 7x at 131,072, 4-layer slice of Llama-3.2-1B, fp32, against stock"
TARGETS = {32_768: 3.0, 131_072: 7.0}
HEADLINE = "tokenselect"  # whose paper reports 2.28x end to end


def run(quick: bool, say: Say) -> Figure:
    """Median of interleaved single-token forwards; the headline is ``tokenselect`` at the shorter length.

    The floor is the same forward without any cached token: what no method that works on attention can go below.
    """
    lengths, kept, repeats = ((512, 1024), 128, 2) if quick else ((32_768, 131_072), 2048, 9)
    recipes = {
        "dense": "dense",  # exact
        "tokenselect": f"tokenselect(refresh=2,int8=true):{kept}",  # a fresh vote in every step and layer
    }
    model = build_slice(quick)
    sizes = {n: measure(model, n, recipes, repeats, say) for n in lengths}
    short, long = (sizes[n] for n in lengths)
    ratios = [row["ratio"][HEADLINE] for row in (short, long)]
    return Figure(
        ours=short["ms"][HEADLINE],
        reference=short["ms"]["stock"],
        target=TARGETS[32_768],
        unit="ms",
        conditions={"128k": ratios[1] >= TARGETS[131_072], "same_output": short["largest_difference"] <= 1e-3},
        detail={
            "method": HEADLINE,
            "ratio_32k": ratios[0],
            "ratio_128k": ratios[1],
            "target_128k": TARGETS[131_072],
            "ratios_exact": [row["ratio"]["dense"] for row in (short, long)],
            "ratios_at_floor": [row["ratio"]["floor"] for row in (short, long)],
            "recipes": recipes,
            "sizes": {str(n): row for n, row in sizes.items()},
            "weight_bytes": weight_bytes(model),
            "repeats": repeats,
        },
    )


def measure(model: torch.nn.Module, tokens: int, recipes: dict[str, str], repeats: int, say: Say) -> dict[str, Any]:
    """Times one step after ``tokens`` cached ones, stock and under every recipe, and compares the exact logits."""
    handles = {name: apply(model, recipe) for name, recipe in recipes.items()}
    caches: dict[str, Any] = {name: handle.cache() for name, handle in handles.items()}
    for handle in handles.values():
        handle.remove()  # the steps go back inside one at a time
    caches["stock"] = stock_cache(model.config)
    fill(model.config, tokens, list(caches.values()))
    logits: dict[str, torch.Tensor] = {}
    argument = cache_argument(model)

    def step_of(name: str) -> Callable[[int], None]:
        def step(i: int) -> None:
            with torch.no_grad():
                logits[name] = model(torch.tensor([[i + 1]]), use_cache=True, **{argument: caches[name]}).logits

        return step

    def floor(i: int) -> None:
        with torch.no_grad():
            model(torch.tensor([[i + 1]]), use_cache=False)

    steps = {name: step_of(name) for name in ("stock", *recipes)} | {"floor": floor}
    ms = milliseconds(interleave(steps, repeats=repeats, warmup=2, inside=handles, say=say))
    return {
        "cache_bytes": cache_bytes(model.config, tokens),
        "ms": ms,
        "ratio": {name: ms["stock"] / ms[name] for name in (*recipes, "floor")},
        "largest_difference": float((logits["dense"] - logits["stock"]).abs().max()),
    }
