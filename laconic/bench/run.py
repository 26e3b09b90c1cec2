"""Runs benchmarks by name and puts each outcome into one JSON object."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from laconic.bench.figure import Say
from laconic.errors import LaconicError

SUMMARIES = {
    "dense_decode": "exact dense decode step (cache and attention) at 65,536 tokens, against sdpa and DynamicCache",
    "tokenselect_decode": "tokenselect decode step at 131,072 tokens, 2,048 read, against the same stock step",
    "read_methods": "decode step of every method that reads a part, at 32,768, 131,072 and (bf16) 524,288 tokens",
    "scoring_pareto": "attention found over bytes read, for published searches and for settings of coarse_to_fine",
    "prefill_methods": "attention of a prompt of 16,384 and 32,768 tokens under every method that computes a part of it",
    "whole_prompt": "first token of a prompt of 16,384 tokens through a layer of Llama-3.2-1B under dhsa and tca_attention",
    "decode_step": "whole decode step of a 4-layer slice of Llama-3.2-1B at 32,768 and 131,072 tokens",
    "decode_memory": "peak memory of generate above weights and KV at 32,768 tokens",
    "cache_reduction": "memory of a cache of 131,072 tokens in which only retrieval heads keep everything, against dense",
    "column_sums": "attention received per key at 16,384 tokens, against eager attention maps",
    "greedy_selection": "10 % of 2,880 image tokens picked greedily by every rule, against the formulas in plain torch",
    "encoder_scores": "what 2,880 patches receive of a vision encoder's attention, against eager attention maps",
    "picture_prefill": "first token of a 4-layer slice of LLaVA-1.5-7B on 576 and 2,880 image tokens, 11.1 % kept, against stock",
    "import_time": "time of `import laconic` beyond `import torch`",
}
PACKAGES = ("laconic", "torch", "transformers", "numba", "triton")


def benchmark_names() -> list[str]:
    """The names that :func:`run_benchmark` takes, in the order in which all of them run."""
    return list(SUMMARIES)


def benchmarks() -> list[dict[str, str]]:
    """Every benchmark as ``{"name": ..., "summary": one line}``."""
    return [{"name": name, "summary": summary} for name, summary in SUMMARIES.items()]


def run_benchmark(name: str, quick: bool = False, progress: Say | None = None) -> dict[str, Any]:
    """Runs one benchmark.

    Args:
        name: one of :func:`benchmark_names`.
        quick: tiny sizes, to see that everything works; the figures then mean nothing.
        progress: takes every line of progress; None writes them to stderr.

    Returns:
        ``name``, ``ratio`` (how many times better than the reference in the same run), ``target`` (the least ratio that
        counts), ``met`` (ratio and all ``conditions``), ``ours``, ``reference``, ``unit``, ``goal`` (in words),
        ``conditions`` (further demands: met or not), ``detail``, ``machine``, ``quick``, ``seconds`` (the whole
        benchmark took), ``command``.

    Raises:
        LaconicError: when there is no such benchmark, or it cannot run on this machine.
    """
    if name not in SUMMARIES:
        near = difflib.get_close_matches(name.lower(), SUMMARIES, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(SUMMARIES)}."
        raise LaconicError(f"There is no benchmark '{name}': {hint}")
    suite = importlib.import_module(f"laconic.bench.suite.{name}")
    say = progress if progress is not None else _to_stderr
    start = time.perf_counter()
    try:
        figure = suite.run(quick, lambda line: say(f"{name}: {line}"))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise LaconicError(f"{name} needs more memory than this machine has free: close other programs.") from error
    return {
        "name": name,
        "ratio": figure.ratio,
        "target": figure.target,
        "met": figure.met,
        "ours": figure.ours,
        "reference": figure.reference,
        "unit": figure.unit,
        "goal": suite.GOAL,
        "conditions": figure.conditions,
        "detail": figure.detail,
        "machine": machine(),
        "quick": quick,
        "seconds": round(time.perf_counter() - start, 2),
        "command": f"laconic bench {name} --json" + (" --quick" if quick else ""),
    }


def run_all(quick: bool = False, progress: Say | None = None) -> list[dict[str, Any]]:
    """Runs every benchmark, one after the other; see :func:`run_benchmark`."""
    return [run_benchmark(name, quick, progress) for name in SUMMARIES]


def machine() -> dict[str, Any]:
    """Processor, cores, memory in bytes, threads of torch and numba, load before, and versions."""
    from laconic.evaluation.provenance import machine as describe

    facts = describe() | {"versions": {name: _version(name) for name in PACKAGES}}
    if "numba" in sys.modules:
        facts["numba_threads"] = sys.modules["numba"].get_num_threads()
    if hasattr(os, "getloadavg"):
        facts["load_1min"] = round(os.getloadavg()[0], 2)
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
