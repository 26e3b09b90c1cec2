"""What ``generate`` needs above the weights and the KV cache, ours against stock."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

import torch

from laconic.bench.child import run_child
from laconic.bench.figure import Figure, Say
from laconic.bench.llama_slice import build_slice, cache_argument, cache_bytes, fill, stock_cache, weight_bytes
from laconic.evaluation.memory import PeakMemory
from laconic.hooks import apply

GOAL = "peak of generate above weights + KV <= 10 % of the KV bytes, at 32,768 tokens"
LIMIT, NEW_TOKENS = 0.10, 8


def run(quick: bool, say: Say) -> Figure:
    """Peaks of two fresh processes; the target is the ratio at which ours would stand just at the limit."""
    found = {}
    for which in ("stock", "ours"):
        found[which] = measure(which, quick) if quick else json.loads(run_child("-m", __name__, which).splitlines()[-1])
        say(f"{which}: {found[which]['excess_share']:.2%} of the KV bytes")
    ours, stock = (found[which]["excess_share"] for which in ("ours", "stock"))
    return Figure(
        ours=ours,
        reference=stock,
        target=stock / LIMIT,
        unit="share of KV bytes",
        conditions={"same_tokens": found["ours"]["tokens"] == found["stock"]["tokens"]},
        detail={"limit": LIMIT, "new_tokens": NEW_TOKENS, **found},
    )


def measure(which: str, quick: bool = False) -> dict[str, Any]:
    """Peak of ``generate`` in this process above what it holds before: weights, a filled cache, loaded libraries.

    A short ``generate`` with a small cache comes first, so that what compilers and libraries load once does not count.
    """
    tokens = 1024 if quick else 32_768
    model = build_slice(quick)
    with apply(model, "dense") if which == "ours" else nullcontext() as handle:
        _generate(model, _filled(model, handle, 64), 64)
        cache = _filled(model, handle, tokens)
        with PeakMemory() as memory:
            written = _generate(model, cache, tokens)
    held = cache_bytes(model.config, tokens)
    excess = max(memory.bytes, 1)
    return {
        "excess_bytes": excess, "excess_share": excess / held, "cache_bytes": held, "weight_bytes": weight_bytes(model),
        "source": memory.source, "tokens": written,
    }  # fmt: skip


def _filled(model: torch.nn.Module, handle: Any, tokens: int) -> Any:
    cache = handle.cache() if handle is not None else stock_cache(model.config)
    fill(model.config, tokens, [cache])
    return cache


def _generate(model: torch.nn.Module, cache: Any, tokens: int) -> list[int]:
    """Greedy tokens after a prompt of which all but the last token are in ``cache`` already."""
    prompt = torch.ones(1, tokens + 1, dtype=torch.long)
    options = {"attention_mask": torch.ones_like(prompt), cache_argument(model): cache}
    output = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return output[0, tokens + 1 :].tolist()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
