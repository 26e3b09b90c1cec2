"""What a cache holds when only the retrieval heads keep everything: bytes of memory, and the time of a step."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from laconic.attention.engine import Policy, attention_forward
from laconic.bench.child import run_child
from laconic.bench.figure import Figure, Say
from laconic.bench.steps import Shape
from laconic.cache import KVCache
from laconic.evaluation.memory import resident_bytes
from laconic.profiles import Profile
from laconic.recipe import Recipe

GOAL = "razor_attention: at least 70 % less memory for the cache at 131,072 tokens, in the process as in the figures"
LEAST, LAYERS, STEPS = 0.70, 2, 9
RECIPE = "razor_attention(induction=0.125, echo=0, profile={}):28%"  # one head of eight, and a fifth of the text for the others


def run(quick: bool, say: Say) -> Figure:
    """Memory of two fresh processes with the same cache, one of them cut; the target is the ratio at the limit."""
    found = {}
    for which in ("dense", "razor_attention"):
        found[which] = measure(which, quick) if quick else json.loads(run_child("-m", __name__, which).splitlines()[-1])
        say(f"{which}: {found[which]['held_bytes'] / 2**20:.0f} MiB held, {found[which]['ms']:.2f} ms per step and layer")
    dense, razor = found["dense"], found["razor_attention"]
    return Figure(
        ours=razor["held_bytes"],
        reference=dense["held_bytes"],
        target=1 / (1 - LEAST),
        unit="bytes",
        conditions={
            "figures_say_the_same": razor["bytes_kept"] <= (1 - LEAST) * dense["bytes_kept"],
            "step_is_faster": razor["ms"] < dense["ms"],
        },
        detail={"recipe": RECIPE.format("FILE"), **found},
    )


def measure(which: str, quick: bool = False) -> dict[str, Any]:
    """What this process holds for a filled cache after some steps, and the time of one."""
    shape = Shape(2048 if quick else 131_072)
    generator = torch.Generator().manual_seed(0)
    incoming = shape.incoming(STEPS, generator)
    with tempfile.TemporaryDirectory(prefix="laconic-bench-") as folder:
        recipe = which if which == "dense" else RECIPE.format(_profile(Path(folder) / "heads.json", shape))
        _steps(_filled(Shape(512), generator), recipe, incoming)  # loads libraries, compiles code
        before = resident_bytes()
        cache = _filled(shape, generator)
        times = _steps(cache, recipe, incoming)
        held = resident_bytes() - before
    figures = cache.request.figures.values()
    return {
        "held_bytes": held, "bytes_kept": sum(f["bytes_kept"] for f in figures), "ms": 1e3 * statistics.median(times) / LAYERS,
        "kept": [f["kept"] for f in figures], "shape": shape.describe(), "layers": LAYERS,
    }  # fmt: skip


def _profile(path: Path, shape: Shape) -> Path:
    """A made-up one: the first head of every layer retrieves."""
    scores = [[float(head == 0) for head in range(shape.kv_heads)]] * LAYERS
    Profile("razor_attention", {}, 0, "", {"induction": scores, "echo": scores}).save(path)
    return path


def _filled(shape: Shape, generator: torch.Generator) -> KVCache:
    cache = KVCache(LAYERS)
    for layer in range(LAYERS):
        cache.update(*shape.filled(generator), layer)
    return cache


def _steps(cache: KVCache, recipe: str, incoming: list) -> list[float]:
    """Seconds of each decode step but the first two, which cut the cache and warm up."""
    cache.request.policy = Policy(Recipe.parse(recipe).methods)
    times = []
    for query, key, value in incoming:
        start = time.perf_counter()
        for layer in range(LAYERS):
            keys, values = cache.update(key, value, layer)
            attention_forward(Shape(0).module, query, keys, values, None)
        times.append(time.perf_counter() - start)
    return times[2:]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
