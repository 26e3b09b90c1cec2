"""What a comparison runs on: a model on a device, and a task as items made ready for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laconic.errors import LaconicError, quote
from laconic.evaluation import measure
from laconic.models.reading import sees, text_side


def check_options(*, question: str, samples: int | None, max_new_tokens: int | None) -> None:
    """Refuses what no task could be run with, before a model is loaded."""
    if question not in ("seen", "after"):
        raise LaconicError(f"question is '{question}': use 'seen' or 'after'.")
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise LaconicError(f"{name.replace('_', '-')} is {value}: give 1 or more, or leave it out.")


def open_model(
    model: str | tuple[Any, Any], device: str | None = None, dtype: str | None = None
) -> tuple[Any, Any, str]:
    """Model, tokenizer and the name to show.

    A name, path or hub id is loaded with ``dtype`` and put on ``device``, by default a GPU where torch finds one. A
    pair ``(model, tokenizer)`` is taken as it is, where it is.
    """
    if isinstance(model, str):
        from laconic.models import load

        network, tokenizer = load(model, dtype)
        return _move(network, device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer, model
    try:
        network, tokenizer = model
    except (TypeError, ValueError):
        raise LaconicError("model is a name, a path, a hub id, or a pair (model, tokenizer).") from None
    return network, tokenizer, getattr(network.config, "_name_or_path", "") or type(network).__name__


def _move(network: Any, device: str) -> Any:
    try:
        return network.to(torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise LaconicError(f"The model does not fit on {device}: use --dtype bfloat16, or --device cpu.") from error
        raise LaconicError(f"There is no usable device {quote(device)}: use cpu, or cuda with a GPU.") from error


def default_task(reader: Any) -> str:
    """What a model is asked where nobody says: questions about pictures, if it sees any."""
    return "shapes_vqa" if sees(reader) else "needle"


@dataclass
class Work:
    """A task made ready for a model; ``notes`` say what was left out."""

    task: Any
    items: list[measure.Item]
    notes: list[str]

    @property
    def metric(self) -> str | None:
        return self.task.metric


def open_work(
    name: str,
    tokenizer: Any,
    *,
    samples: int | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    question: str = "seen",
    max_new_tokens: int | None = None,
) -> Work:
    """Loads a task and makes its examples ready. Raises LaconicError for one that is empty or does not fit."""
    from laconic.evaluation.tasks import load_task

    task = load_task(name, text_side(tokenizer), samples=samples, lengths=lengths, seed=seed)
    if not task.examples:
        raise LaconicError(f"The task {name} has no examples: give at least one line with a prompt.")
    if not sees(tokenizer) and any(example.pictures for example in task.examples):
        raise LaconicError(f"The task {name} shows pictures, and this model reads text only: use one that sees.")
    if question == "after" and not any(example.question for example in task.examples):
        raise LaconicError(f"No example of {name} has a 'question', which --question after needs: use --question seen.")
    perplexity = task.metric == "perplexity"
    items = measure.prepare(
        task.examples, tokenizer, perplexity=perplexity, question=question, max_new_tokens=max_new_tokens
    )
    return Work(task, items, [f"{task.name}: {problem}" for problem in task.problems])
