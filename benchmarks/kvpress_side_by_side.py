"""Laconic and kvpress side by side: the same model, prompts and number of kept tokens, in one run.

kvpress needs an older transformers, and so an environment of its own:

    python -m venv peer && peer/bin/pip install --constraint constraints.txt torch kvpress
    python benchmarks/kvpress_side_by_side.py --peer peer/bin/python --json side-by-side.json

Prints a table: kept sets in common (intersection over union), right answers, prefill, decode per token and peak memory of both.
Both cut the prompt once (ours can also hold the budget while decoding). What differs by design: ours keeps ties at the lowest
position; where heads keep different numbers of tokens, kvpress masks what it drops (AdaKV, DuoAttention), ours leaves it out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from kvpress_peer import timed_run

SNAP = {"window_size": 64, "kernel_size": 5}
ENDS = {"sink_size": 4, "recent_size": 64}
PAIRS: tuple[tuple[str, str, dict[str, Any]], ...] = (  # our recipe, the press, its options
    ("snapkv(window=64,kernel=5)", "SnapKVPress", SNAP),
    ("knorm(sinks=0,recent=0,once=true)", "KnormPress", {}),
    ("tova(once=true)", "TOVAPress", {}),
    ("keydiff(sinks=0,recent=0,once=true)", "KeyDiffPress", {}),
    ("expected_attention(once=true)", "ExpectedAttentionPress", {}),
    ("pyramidkv(window=64,kernel=5)", "PyramidKVPress", SNAP),
    ("adakv(snapkv(window=64,kernel=5))", "AdaKVPress", {"press": {"name": "SnapKVPress", "options": SNAP}}),
    ("streaming(once=true)", "StreamingLLMPress", {}),
    ("duo_attention(recent=64,once=true)", "DuoAttentionPress", {**ENDS, "heads": 2}),  # the two heads that retrieve
)


def ours(model: Any, recipe: str, examples: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """All examples under one recipe."""
    import laconic

    results = []
    for ids in examples:
        with laconic.apply(model, recipe) as handle:
            cache = handle.cache()
            kept: list[Any] = []

            def forward(new: torch.Tensor, at: int, cache: Any = cache, kept: list = kept) -> torch.Tensor:
                with torch.no_grad():
                    logits = model(new, past_key_values=cache, logits_to_keep=1).logits[:, -1]
                if not at:
                    kept.extend(layer.positions[0].tolist() for layer in cache.layers)
                return logits

            result = timed_run(forward, torch.tensor([ids]), new_tokens)
        results.append({**result, "kept": [[[p for p in head if p >= 0] for head in layer] for layer in kept]})
    return results


def overlap(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """Mean intersection over union of the kept sets, over examples, layers and heads."""
    shares = []
    for left, right in zip(a, b, strict=True):
        for layer, other in zip(left["kept"], right["kept"], strict=True):
            shares += [len(set(x) & set(y)) / len(set(x) | set(y)) for x, y in zip(layer, other, strict=True)]
    return statistics.mean(shares)


def summary(results: list[dict[str, Any]], answers: list[str], tokenizer: Any) -> dict[str, float]:
    """Right answers, and the median of time and memory."""
    texts = [tokenizer.decode(result["tokens"]) for result in results]
    figures = {key: statistics.median(r[key] for r in results) for key in ("prefill_s", "decode_s", "peak_bytes")}
    kept = statistics.mean(len(head) for r in results for layer in r["kept"] for head in layer)
    return {"right": statistics.mean(a in t for a, t in zip(answers, texts, strict=True)), "kept": kept, **figures}


def main() -> None:
    """Command line entry."""
    import laconic
    from laconic.evaluation.tasks import load_task

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of the environment with kvpress")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--kept", type=float, default=0.1, help="share that stays")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model, tokenizer = laconic.load("needle")
    zoo = Path(laconic.models.__file__).parent / "zoo" / "needle"
    task = load_task("needle", tokenizer, lengths=[arguments.length], samples=arguments.samples)
    examples = [tokenizer(example.prompt)["input_ids"] for example in task.examples]
    answers = [example.answer for example in task.examples]
    gates = json.loads((zoo / "profiles" / "duo_attention.json").read_text())["tables"]["gates"]
    rows = [{"press": press, "options": options, "ratio": 1 - arguments.kept} for _, press, options in PAIRS]
    rows[-1]["options"] |= {"gates": gates}
    job = {
        "model": str(zoo), "examples": examples, "rows": rows,
        "new_tokens": arguments.new_tokens, "threads": torch.get_num_threads(),
    }  # fmt: skip
    peer = subprocess.run(
        [arguments.peer, str(Path(__file__).parent / "kvpress_peer.py")],
        input=json.dumps(job), capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    if peer.returncode:
        sys.exit(f"kvpress did not run in {arguments.peer}:\n{peer.stderr[-2000:]}")
    theirs = [json.loads(line) for line in peer.stdout.splitlines()][1:]

    table = []
    ours(model, "dense", examples[:1], arguments.new_tokens)  # compiles
    for (recipe, press, _), row in zip(PAIRS, theirs, strict=True):
        count = math.ceil(statistics.mean(len(h) for r in row["examples"] for layer in r["kept"] for h in layer) - 1e-9)
        ours(model, f"{recipe}:{count}", examples[:1], arguments.new_tokens)
        mine = ours(model, f"{recipe}:{count}", examples, arguments.new_tokens)
        table.append({
            "recipe": f"{recipe}:{count}", "press": press, "overlap": overlap(mine, row["examples"]),
            "ours": summary(mine, answers, tokenizer), "kvpress": summary(row["examples"], answers, tokenizer),
        })  # fmt: skip
    print("| recipe | kept sets in common | right | prefill | decode per token | peak memory |\n|---|---|---|---|---|---|")
    for row in table:
        a, b = row["ours"], row["kvpress"]
        print(
            f"| `{row['recipe']}` | {row['overlap']:.1%} | {a['right']:.0%} / {b['right']:.0%} "
            f"| {1e3 * a['prefill_s']:.0f} / {1e3 * b['prefill_s']:.0f} ms "
            f"| {1e3 * a['decode_s']:.2f} / {1e3 * b['decode_s']:.2f} ms "
            f"| {a['peak_bytes'] / 1e6:.0f} / {b['peak_bytes'] / 1e6:.0f} MB |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments) | {"json": None}, "rows": table}, indent=2))


if __name__ == "__main__":
    main()
