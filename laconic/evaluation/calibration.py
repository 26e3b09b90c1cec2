"""Texts to calibrate on, as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.evaluation.haystack import read_text, reference_text
from laconic.evaluation.tasks import load_task


def text_samples(tokenizer: Any, text: Path | None, tokens: int, samples: int) -> list[torch.Tensor]:
    """``samples`` stretches of ``tokens`` ids, spread over a UTF-8 file or the built-in text."""
    ids = tokenizer(read_text(text) if text else reference_text(), return_tensors="pt")["input_ids"][0]
    if len(ids) < tokens:
        raise LaconicError(f"The text has {len(ids)} tokens only: give a longer one, or --tokens {len(ids)}.")
    step = max(1, (len(ids) - tokens) // samples)
    return [ids[i * step : i * step + tokens] for i in range(samples) if i * step + tokens <= len(ids)]


def calibration_texts(tokenizer: Any, text: Path | None, tokens: int, samples: int, seed: int) -> list[torch.Tensor]:
    """Stretches of a file; without one, prompts of the built-in needle task, whose ends ask for something in the text."""
    if text is not None:
        return text_samples(tokenizer, text, tokens, samples)
    task = load_task("needle", tokenizer, lengths=[tokens], samples=samples, seed=seed)
    return [tokenizer(example.prompt, return_tensors="pt")["input_ids"][0] for example in task.examples]
