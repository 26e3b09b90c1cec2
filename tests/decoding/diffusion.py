"""Tiny random models that pass for diffusion models, and the plainest decoding of them."""

from __future__ import annotations

import functools

import torch
from tiny import VOCABULARY, build

MASK = VOCABULARY - 1


@functools.cache
def make(name: str = "llama", *, kind: str = "masked", end: int | None = None, **changes):
    """A random model that fills in masks, and is surer of some than of others; ``end`` is its end token.

    Every test gets the same one: copy it before changing it.
    """
    model = build(name, sharpen=16.0, **changes)
    model.get_output_embeddings().weight.data.mul_(3.0)
    model.config.diffusion, model.config.mask_token_id = kind, MASK
    model.generation_config.eos_token_id = end
    return model


def prompt(length: int = 9, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, MASK, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def full_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(rows, n, vocabulary)`` when everything sees everything; a mask is never predicted."""
    seen = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    logits[..., MASK] = -torch.inf
    return logits


def one_per_step(model, ids: torch.Tensor, new: int, block: int) -> torch.Tensor:
    """The new ids when each forward commits the most confident position of the block, written without any of our code."""
    canvas = torch.cat([ids, ids.new_full((1, new), MASK)], 1)
    for start in range(ids.shape[1], canvas.shape[1], block):
        while bool((canvas[:, start : start + block] == MASK).any()):
            law = full_logits(model, canvas)[0, start : start + block].softmax(-1)
            sure, token = law.max(-1)
            sure[canvas[0, start : start + block] != MASK] = -1
            canvas[0, start + int(sure.argmax())] = token[int(sure.argmax())]
    return canvas[:, ids.shape[1] :]
