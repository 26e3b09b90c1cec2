"""How the built-in language models are trained: a loop over windows of text that stops by the clock and can be resumed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laconic.models.checkpoint import save, saved_state
from laconic.models.text_data import Batches, prepare

TOKENS = 4096  # of a batch
SHORT, LONG = 256, 1024  # length of the windows, first and at the end: attention over long ones takes its time
LATE = 0.75  # share of the time after which they are long
COOLING = 0.6  # share of the time, at the end, in which the learning rate falls to nothing
WARMUP = 100  # steps
RATE = 3e-3

Loss = Callable[..., torch.Tensor]  # of the model and the tensors of a batch


def optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for embeddings and norms."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in inside}
    outside = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    make: Callable[[Any], torch.nn.Module], loss_of: Loss, data: Path, out: Path, minutes: float, seed: int, fuse: bool,
    feed: Callable[[Any, np.ndarray, int], Any] | None = None, rate: float = RATE,
) -> None:  # fmt: skip
    """Trains for ``minutes`` of wall clock, counted over all resumed runs.

    Args:
        make: gives the model, with random weights, for a tokenizer.
        loss_of: the loss of a model on ids ``(rows, length)``, or on what ``feed`` gives; runs under bf16 autocast.
        fuse: compile the loss, a fifth faster where a C++ compiler is at hand.
        feed: makes of tokenizer, text and seed something whose ``take(rows, length)`` gives arrays; else windows of the text.
        rate: the highest learning rate.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer, corpus = prepare(data, out)
    model = make(tokenizer)
    steps = optimizers(model, rate)
    state = {"step": 0, "elapsed": 0.0}
    if (saved := saved_state(out)) is not None:
        model.load_state_dict(saved["model"])
        for optimizer, inside in zip(steps, saved["optimizers"], strict=True):
            optimizer.load_state_dict(inside)
        state = {key: saved[key] for key in state}
    print(f"{len(corpus):,} tokens of text, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    computed = torch.compile(loss_of, dynamic=False) if fuse else loss_of
    seed += state["step"]
    batches = Batches(corpus, seed) if feed is None else feed(tokenizer, corpus, seed)
    _loop(model, steps, computed, batches, state, out, minutes, rate)


def _loop(
    model: torch.nn.Module, steps: list[torch.optim.Optimizer], loss_of: Loss, batches: Any, state: dict[str, Any], out: Path,
    minutes: float, highest: float,
) -> None:  # fmt: skip
    begun, before, saved = time.time(), state["elapsed"], time.time()
    recent: list[float] = []
    while state["elapsed"] < minutes * 60:
        share = state["elapsed"] / (minutes * 60)
        rate = highest * min(1.0, (state["step"] + 1) / WARMUP, max(0.02, (1 - share) / COOLING))
        for optimizer in steps:
            for group in optimizer.param_groups:
                group["lr"] = rate
        length = LONG if share > LATE else SHORT
        drawn = batches.take(TOKENS // length, length)
        arrays = drawn if isinstance(drawn, tuple) else (drawn,)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, *map(torch.from_numpy, arrays))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        state["step"] += 1
        state["elapsed"] = before + time.time() - begun
        if state["step"] % 50 == 0:
            print(
                f"{state['elapsed']:6.0f} s  step {state['step']}  windows of {length}  loss {np.mean(recent[-50:]):.3f}  "
                f"rate {rate:.1e}", flush=True,
            )  # fmt: skip
        if time.time() - saved > 120:
            save(model, out, optimizers=[optimizer.state_dict() for optimizer in steps], **state)
            saved = time.time()
    save(model, out, optimizers=[optimizer.state_dict() for optimizer in steps], **state)


def arguments(description: str, minutes: float, **choices: Any) -> argparse.Namespace:
    """The command line of a training command; ``choices``: further options by name, with the arguments of ``add_argument``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/books/*.xz and text/technical/*.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, tokenizer and resume state")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"wall-clock budget (default {minutes:g})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="fuse the loss with torch.compile; needs a C++ compiler")
    for name, options in choices.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()
