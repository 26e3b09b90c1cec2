"""Forwards, computed rows, quality and time of the diffusion methods: ``python benchmarks/diffusion.py --model DIR``.

Every method answers the same held-out questions of `laconic.models.templates`. Prints one JSON object: per method right answers
(exact match), forwards and computed token rows per question, needed tokens per forward, and its processor time relative to the
first method of its model, which commits one token per step. One thread; processor time, so that other work on the machine
does not count. `oracle` knows that method's answer and commits all that agrees with it: nothing that gives the same text needs
much fewer forwards, one block after the other. Its time says nothing, and is left out. ``--picture`` draws right answers over
forwards. Of each model also the loss on text that no model was trained on, in nats per token: of the masks, averaged over
eight shares of them from 6 % to 94 % (which bounds the likelihood), or of the next token where attention is causal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from drawing import save, subplots

import laconic
from laconic.bench.run import machine
from laconic.decoding.canvas import Run
from laconic.decoding.diffuse import diffuse
from laconic.decoding.diffusion import Rule
from laconic.decoding.full_canvas import FullCanvas
from laconic.decoding.learn2pd import Oracle
from laconic.errors import LaconicError
from laconic.evaluation.haystack import reference_text
from laconic.models.templates import Question, questions

MASKED = (
    "full_canvas", "full_canvas(per_step=2)", "full_canvas(per_step=4)", "oracle", "fast_dllm(threshold=0.5)",
    "fast_dllm(threshold=0.75)", "fast_dllm", "fast_dllm(threshold=0.97)", "fast_dllm(plan=prefix)", "fast_dllm(plan=dual)",
    "local_leap", "local_leap(plan=dual)", "learn2pd(threshold=0.5, end=false)", "learn2pd(threshold=0.8, end=false)",
    "learn2pd(threshold=0.9, end=false)", "learn2pd(end=false)", "learn2pd(threshold=0.99, end=false)", "learn2pd",
    "learn2pd(plan=dual)", "full_canvas(block=256)",
    "window_diffusion(refresh=1)", "window_diffusion(refresh=8)", "window_diffusion",
    "window_diffusion(refresh=8, active=8, window=16)", "window_diffusion(refresh=8, active=4, window=10)",
)  # fmt: skip
CAUSAL = (
    "wedlm(window=1, entropy=0)", "wedlm(entropy=0)", "wedlm(entropy=0.1)", "wedlm", "wedlm(entropy=0.8)",
    "wedlm(window=4, entropy=0.1)", "wedlm(window=4)", "wedlm(window=4, entropy=0.8)", "wedlm(contiguous=true)",
)  # fmt: skip
ORACLE = "oracle"
TICKS = (1, 2, 3, 5, 10, 20, 50, 100)  # forwards, in the picture
Answer = Callable[[torch.Tensor], tuple[torch.Tensor, int, int, int]]  # new ids, tokens, forwards, rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a masked-diffusion model, as laconic.models.train_mask makes it")
    parser.add_argument("--profile", help="its profile for learn2pd, which is left out otherwise")
    parser.add_argument("--causal", help="a model with causal attention, for wedlm")
    parser.add_argument("--samples", type=int, default=90, help="questions (default 90)")
    parser.add_argument("--canvas", type=int, default=128, help="new tokens that there is room for (default 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", help="these only")
    parser.add_argument("--picture", type=Path, help="file for a picture, SVG; needs matplotlib, of the extra docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, losses = [], {}
    for name, methods in ((options.model, MASKED), (options.causal, ("autoregressive", *CAUSAL))):
        if name is None:
            continue
        model, tokenizer = laconic.load(name)
        asked = list(itertools.islice(questions(options.seed, held_out=True), options.samples))
        first, losses[name] = None, text_loss(model, tokenizer)
        for method in methods:
            if options.methods and method not in options.methods:
                continue
            try:
                row = measure(model, tokenizer, with_profile(method, options.profile), asked, options.canvas)
            except LaconicError as error:
                print(f"{method}: {error}", file=sys.stderr)
                continue
            first = first or row["seconds"]
            speedup = None if method == ORACLE else first / row["seconds"]
            rows.append({"model": name, **row, "method": method, "speedup": speedup})
            print(f"{method}: {row['right']:.3f} right, {row['forwards']:.1f} forwards", file=sys.stderr, flush=True)
    settings = {"samples": options.samples, "canvas": options.canvas, "seed": options.seed}
    print(json.dumps({**settings, "text_loss": losses, "rows": rows, "machine": machine()}, indent=2), flush=True)
    if options.picture:
        draw([row for row in rows if row["model"] == options.model], options.picture)


def with_profile(method: str, profile: str | None) -> str:
    """The recipe of learn2pd with the file of its profile."""
    name, _, parameters = method.rstrip(")").partition("(")
    if name != "learn2pd" or not profile:
        return method
    return f"{name}({', '.join(filter(None, [parameters, f'profile={profile}']))})"


@torch.inference_mode()
def text_loss(model: Any, tokenizer: Any, windows: int = 16, length: int = 256) -> float:
    """Nats per token on the held-out half of the Python language reference."""
    ids = tokenizer(reference_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    ids = ids[: len(ids) // length * length].view(-1, length)
    ids = ids[:: max(1, len(ids) // windows)][:windows]
    if model.config.diffusion == "causal":
        return float(model(input_ids=ids, labels=ids).loss)
    noise, seen, losses = torch.Generator().manual_seed(0), torch.zeros(len(ids), 1, length, length), []
    for step in range(8):
        masked = torch.rand(ids.shape, generator=noise) < (step + 0.5) / 8
        logits = model(input_ids=ids.masked_fill(masked, model.config.mask_token_id), attention_mask=seen).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits[masked], ids[masked])))
    return sum(losses) / len(losses)


def measure(model: Any, tokenizer: Any, method: str, asked: list[Question], canvas: int) -> dict[str, Any]:
    """One method on all questions."""
    answer = autoregressive(model, canvas) if method == "autoregressive" else diffusion(model, method, canvas)
    prompts = [tokenizer(question.prompt, return_tensors="pt")["input_ids"] for question in asked]
    answer(prompts[0])  # what happens once is not measured
    begun = time.process_time()
    found = [answer(ids) for ids in prompts]
    seconds = time.process_time() - begun
    right = [tokenizer.decode(ids, skip_special_tokens=True) == q.answer for (ids, *_), q in zip(found, asked, strict=True)]
    tokens, forwards, rows = (sum(row[i] for row in found) for i in (1, 2, 3))
    kinds = {q.kind: [] for q in asked}
    for q, good in zip(asked, right, strict=True):
        kinds[q.kind].append(good)
    return {
        "method": method,
        "right": sum(right) / len(right),
        "forwards": forwards / len(asked),
        "tokens": tokens / len(asked),
        "tokens_per_forward": tokens / forwards,
        "rows": rows / len(asked),
        "seconds": seconds / len(asked),
        "kinds": {kind: sum(marks) / len(marks) for kind, marks in kinds.items()},
    }


def diffusion(model: Any, method: str, canvas: int) -> Answer:
    """Answers with one of our methods."""

    def answer(ids: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
        out = diffuse(model, ids, Told() if method == ORACLE else method, max_new_tokens=canvas)
        return out.ids[0], out.lengths[0], out.forwards, out.rows

    return answer


@dataclass(frozen=True, kw_only=True)
class Told(FullCanvas):
    """Commits all that agrees with what `full_canvas` answers, which it asks first."""

    id: ClassVar[str] = "oracle"

    def rule(self, run: Run) -> Rule:
        slow = Run(run.model, run.ids[:, : run.start], run.length - run.start)
        FullCanvas().decode(slow)
        return Oracle(slow.ids, self.block)


def autoregressive(model: Any, canvas: int) -> Answer:
    """Answers token by token, with the cache and the greedy generation of transformers."""

    def answer(ids: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=canvas, do_sample=False,
                pad_token_id=model.config.pad_token_id,
            )[0, ids.shape[1] :]  # fmt: skip
        return out, len(out), len(out), ids.shape[1] + len(out) - 1

    return answer


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Right answers over forwards per question: a line per method over its settings, blocks of one length, no cache."""
    figure, axis = subplots(figsize=(7, 4.2))
    shown = [row for row in rows if "plan" not in row["method"] and "block" not in row["method"]]
    names = list(dict.fromkeys(row["method"].partition("(")[0] for row in shown if "window" not in row["method"]))
    for i, name in enumerate(names):
        own = sorted((row["forwards"], 100 * row["right"]) for row in shown if row["method"].partition("(")[0] == name)
        axis.plot(*zip(*own, strict=True), label=name, marker="os^Dv"[i % 5], markersize=5, linewidth=1)
    axis.set(xscale="log", xlabel="forwards per question", ylabel="right answers, %", ylim=(0, 100))
    axis.set_xticks(TICKS, map(str, TICKS))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    save(figure, path)


if __name__ == "__main__":
    main()
