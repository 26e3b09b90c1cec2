"""Attention of a whole prompt under every method that computes a part of it, against transformers' sdpa attention."""

from __future__ import annotations

import time
from typing import Any

import torch

from laconic.attention.boundaries import BoundaryPredictor
from laconic.attention.engine import Policy, attention_forward
from laconic.bench.figure import Figure, Say, interleave, milliseconds
from laconic.bench.steps import Shape
from laconic.cache import KVCache
from laconic.recipe import Recipe

GOAL = "attention of a prompt of 32,768 tokens in at most 0.8 of stock's time; token_sparse_attention 3.23x at 131,072"
RECIPES = {  # half of the tokens of each head; 2,048 tokens per block of queries, where the source's stretches are of one length
    "token_sparse_attention": "token_sparse_attention(layers=all):50%",
    "dhsa": "dhsa(borders=fixed):{dhsa}",
    "dense": "dense",
}
FAR, CLAIM = 131_072, 3.23


def run(quick: bool, say: Say) -> Figure:
    """The headline is the slower method at the longer length, against stock."""
    lengths = (512, 1024) if quick else (16_384, 32_768)
    tables = [measure(Shape(n), quick, say) for n in lengths]
    last = tables[-1]
    slowest = max((name for name in RECIPES if name != "dense"), key=lambda name: last["ms"][name])
    far = extrapolate(tables, FAR)
    return Figure(
        ours=last["ms"][slowest],
        reference=last["ms"]["stock"],
        target=1 / 0.8,
        unit="ms",
        conditions={"token_sparse_attention_far": far["stock"] / far["token_sparse_attention"] >= CLAIM},
        detail={
            "slowest": slowest, "sizes": tables, "extrapolated_ms": far, "extrapolated_tokens": FAR,
            "against_stock_far": {name: far["stock"] / far[name] for name in RECIPES},
        },
    )  # fmt: skip


def measure(shape: Shape, quick: bool, say: Say) -> dict[str, Any]:
    """Times in ms of stock, our exact attention and all methods, the share of pairs that each computes, and the time in which
    dhsa's network finds the borders, once for all layers."""
    generator = torch.Generator().manual_seed(0)
    keys, values = shape.filled(generator)
    query = torch.randn(1, shape.heads, shape.tokens, shape.head_dim, generator=generator)
    pairs: dict[str, float] = {}

    def stock(_: int) -> torch.Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(shape.module, query, keys, values, None, scaling=shape.scale, is_causal=True)[0]

    def ours(name: str) -> Any:
        recipe = RECIPES[name].format(dhsa=2048 if not quick else 320)

        def step(_: int) -> torch.Tensor:
            cache = KVCache(1)
            cache.request.policy = Policy(Recipe.parse(recipe).methods)
            held = cache.update(keys, values, 0)
            output = attention_forward(shape.module, query, *held, None, scaling=shape.scale)[0]
            pairs[name] = cache.request.figures[0]["pairs"]
            return output

        return step

    steps = {"stock": stock, **{name: ours(name) for name in RECIPES}}
    ms = milliseconds(interleave(steps, repeats=2 if shape.tokens < 20_000 else 1, warmup=1 if quick else 0, say=say))
    return {"shape": shape.describe(), "ms": ms, "pairs": pairs, "borders_ms": _borders_ms(keys)}


def _borders_ms(keys: torch.Tensor) -> float:
    side_by_side = keys[0].transpose(0, 1).flatten(1)
    predictor = BoundaryPredictor(side_by_side.shape[1]).eval()
    with torch.no_grad():
        start = time.perf_counter()
        predictor(side_by_side[:2048])
        return 1e3 * (time.perf_counter() - start) * len(side_by_side) / min(2048, len(side_by_side))


def extrapolate(tables: list[dict[str, Any]], tokens: int) -> dict[str, float]:
    """Times at ``tokens`` from those at two lengths, as a n + b n^2; what grows with n alone fits as well."""
    (short, long), found = tables, {}
    x, y = (table["shape"]["tokens"] for table in tables)
    for name in short["ms"]:
        per_x, per_y = short["ms"][name] / x, long["ms"][name] / y
        square = max(0.0, (per_y - per_x) / (y - x))
        found[name] = tokens * (per_y + square * (tokens - y))
    return found
