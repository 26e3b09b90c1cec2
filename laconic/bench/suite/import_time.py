"""What ``import laconic`` costs a program that imports torch anyway."""

from __future__ import annotations

import statistics

from laconic.bench.child import run_child
from laconic.bench.figure import Figure, Say

GOAL = "< 0.3 s beyond importing torch"
LIMIT = 0.3
CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import laconic
print(middle - start, time.perf_counter() - middle)
"""


def run(quick: bool, say: Say) -> Figure:
    """Median over fresh interpreters; the reference is ``import torch`` in the same interpreter."""
    runs = []
    for _ in range(1 if quick else 5):
        runs.append(measure())
        say(f"torch {runs[-1][0]:.3f} s, laconic {runs[-1][1]:.3f} s more")
    torch_s, extra_s = (statistics.median(values) for values in zip(*runs, strict=True))
    return Figure(
        ours=extra_s,
        reference=torch_s,
        target=torch_s / LIMIT,
        unit="s",
        detail={"limit_s": LIMIT, "runs": len(runs), "largest_s": max(extra for _, extra in runs)},
    )


def measure() -> tuple[float, float]:
    """Seconds of ``import torch`` and, after it, of ``import laconic``, in a fresh interpreter."""
    torch_s, extra_s = map(float, run_child("-c", CODE).split())
    return torch_s, extra_s
