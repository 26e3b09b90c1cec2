"""Dense accuracy of a model for its card: ``python -m laconic.models.evaluate --model needle``.

Plain transformers, greedy, nothing of Laconic's cache: it can judge ``laconic compare`` too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.evaluation.metrics import score
from laconic.evaluation.tasks import Task, load_task, task_names
from laconic.models import load

TASKS = ("needle", "multi_needle", "threads:forward", "threads:backward", "kv_recall", "perplexity")
LENGTHS = (1024, 2048, 4096, 8192)
TEXTS = 8


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of a prompt, up to the end mark."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model: Any, tokenizer: Any, task: Task) -> float:
    """Mean score 0..1 of the examples."""
    scores = [
        score(task.metric, answer(model, tokenizer, e.prompt, e.max_new_tokens), e.answer, e.choices) for e in task.examples
    ]
    return sum(scores) / len(scores)


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, task: Task) -> float:
    """exp of the mean negative log-likelihood in nats of the tokens in the second half of each text."""
    total, count = 0.0, 0
    for example in task.examples:
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"].to(model.device)
        half = ids.shape[1] // 2
        logits = model(input_ids=ids, use_cache=False).logits[0, half - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, half:], reduction="sum"))
        count += ids.shape[1] - half
    return math.exp(total / count)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    samples: int = 50,
    seed: int = 1,
) -> dict[str, dict[int, float]]:
    """Per task and length in tokens: the accuracy 0..1 of ``samples`` examples, or the perplexity of up to 8 texts."""
    table: dict[str, dict[int, float]] = {}
    for name in tasks:
        table[name] = {}
        for length in lengths:
            texts = name == "perplexity"
            count = min(TEXTS, samples) if texts else samples
            task = load_task(name, tokenizer, samples=count, lengths=[length], seed=seed)
            table[name][length] = (perplexity if texts else accuracy)(model, tokenizer, task)
            print(f"{name} at {length} tokens: {table[name][length]:.3f}", file=sys.stderr, flush=True)
    return table


def markdown(table: dict[str, dict[int, float]]) -> str:
    """The figures as a table for a model card."""
    lengths = list(next(iter(table.values())))
    lines = ["| task | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for name, row in table.items():
        cells = [f"{v:.2f}" if name == "perplexity" else f"{v:.1%}" for v in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description="Dense greedy accuracy of a model on the built-in tasks.")
    parser.add_argument("--model", default="needle", help="built-in name, folder or hub id (default needle)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=task_names(), metavar="TASK")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="prompt lengths in tokens")
    parser.add_argument("--samples", type=int, default=50, help="examples per task and length (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the examples (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = load(options.model, dtype="float32")
        table = evaluate(model, tokenizer, options.tasks, options.lengths, options.samples, options.seed)
    except LaconicError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(table) if options.json else markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
