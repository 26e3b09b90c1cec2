"""Results of realistic shape for tests of the report page: nine methods, four budgets, three lengths, five depths."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

METHODS = {  # name: (verb, share of dense quality that is kept at 5 %)
    "random": ("evict", 0.05), "streaming": ("evict", 0.2), "knorm": ("evict", 0.35), "tova": ("evict", 0.8),
    "snapkv": ("evict", 0.9), "h2o": ("evict", 0.3), "tokenselect": ("read", 1.0), "recycled_attention": ("read", 0.93),
}  # fmt: skip
BUDGETS = {"5%": 0.05, "10%": 0.1, "20%": 0.2, "50%": 0.5}
LENGTHS, DEPTHS = (1024, 2048, 4096), (0.0, 0.25, 0.5, 0.75, 1.0)
KV_BYTES = 2 * 3 * 2 * 64 * 4 * 4096  # keys and values, layers, heads, head size, fp32, tokens


def cells(rng: random.Random, chance: float) -> list[dict[str, Any]]:
    found = []
    for length in LENGTHS:
        for depth in DEPTHS:
            right = rng.random() < chance
            found.append({
                "meta": {"length": length, "depth": depth, "needles": 1}, "tokens": length, "correct": float(right),
                "fidelity": 1.0 if right else 0.4, "kl": 0.01, "answer": "Velmor Tarin",
                "prediction": " Velmor Tarin." if right else " the <b>river</b> & beyond",
            })  # fmt: skip
    return found


def row(method: str, budget: str, share: float, quality: float, verb: str, rng: random.Random) -> dict[str, Any]:
    own = cells(rng, quality)
    reads = KV_BYTES * (share if verb == "evict" else min(1.0, share + 0.12))
    return {
        "run": "0123456789abcdef", "method": method, "recipe": method if method == "dense" else f"{method}:{budget}",
        "budget": budget, "task": "needle", "guarantee": "exact" if method == "dense" else "lossy",
        "quality": sum(cell["correct"] for cell in own) / len(own), "quality_name": "contains",
        "fidelity": sum(cell["fidelity"] for cell in own) / len(own), "kl": 3 * (1 - quality), "kept": 2400 * share,
        "kept_share": share, "bytes_kept": KV_BYTES * (share if verb == "evict" else 1.0), "bytes_read": reads,
        "prefill_s": 0.35 + 0.1 * rng.random(), "decode_s": 0.0031 + 0.0035 * reads / KV_BYTES + 0.0005 * rng.random(),
        "dropped_mass": 0.4 * (1 - share) * (1 - 0.8 * quality), "peak_bytes": 9e6 + KV_BYTES * (0.3 + share),
        "peak_source": "VmHWM", "examples": len(own), "cells": own,
    }  # fmt: skip


def results() -> list[dict[str, Any]]:
    """33 rows, dense first."""
    rng = random.Random(0)
    rows = [row("dense", "100%", 1.0, 1.0, "evict", rng)]
    for method, (verb, start) in METHODS.items():
        for budget, share in BUDGETS.items():
            rows.append(row(method, budget, share, start + (1 - start) * share, verb, rng))
    return rows


def header() -> dict[str, Any]:
    return {
        "command": "laconic compare --task needle --output 'my report'",
        "versions": {"laconic": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
        "machine": {
            "device": "Some Processor @ 2.5 GHz, 2 cores", "cores": 2, "threads": 2, "memory": 25_000_000_000,
            "system": "Linux x86_64", "python": "3.11.7",
        },
        "model": {"id": "needle", "architecture": "LlamaForCausalLM", "parameters": 1_262_464, "dtype": "float32"},
        "task": {"name": "needle", "metric": "contains", "examples": 15},
        "seed": 0, "question": "seen", "methods": ["dense", *METHODS], "budgets": list(BUDGETS), "skipped": [],
        "notes": [], "started": "2025-01-01T10:00:00+00:00", "finished": "2025-01-01T10:02:31+00:00",
        "fingerprint": "0123456789abcdef", "identity": {},
    }  # fmt: skip


def write_results(directory: Path, rows: list[dict[str, Any]] | None = None, run: dict[str, Any] | None = None) -> Path:
    """Writes both files as ``laconic compare`` does; an empty ``run`` writes no header."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = results() if rows is None else rows
    (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = header() if run is None else run
    if run:
        (directory / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return directory
