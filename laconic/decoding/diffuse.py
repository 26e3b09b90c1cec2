"""Text from a diffusion language model: one function for all methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from laconic.decoding.canvas import Run, Step
from laconic.decoding.diffusion import DiffusionMethod
from laconic.errors import LaconicError
from laconic.recipe import Recipe

ATTENTION = ("sdpa", "eager")  # those that take a mask of ours


@dataclass(frozen=True)
class Diffused:
    """What came out of :func:`diffuse`.

    Attributes:
        ids: the new tokens ``(rows, n)``; what follows an end token is that token again.
        lengths: per row, how many of them are needed: up to the end token, and with it.
        forwards: passes through the model, a prefill included.
        rows: token rows that they computed, over the batch: forwards x length for a full canvas.
        steps: what was committed when (:class:`laconic.decoding.canvas.Step`).
    """

    ids: torch.Tensor
    lengths: list[int]
    forwards: int
    rows: int
    steps: list[Step]

    @property
    def tokens_per_forward(self) -> float:
        """Needed tokens per forward, mean over the rows of the batch."""
        return sum(self.lengths) / len(self.lengths) / self.forwards


@torch.inference_mode()
def diffuse(
    model: Any,
    ids: torch.Tensor,
    method: str | DiffusionMethod = "full_canvas",
    *,
    max_new_tokens: int = 128,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    on_step: Callable[[Step, torch.Tensor], None] | None = None,
) -> Diffused:
    """Writes after ``ids`` by filling in ``max_new_tokens`` masks, in the order and number per forward that ``method`` chooses.

    Args:
        model: a causal language model of transformers whose ``config.diffusion`` says that it fills in masks ("masked": run
            with full attention; "causal": see ``wedlm``) and whose ``config.mask_token_id`` names the mask. One that predicts
            the next token, as Dream does, says so with ``config.diffusion_shift = True``.
        ids: the prompt ``(rows, n)``, padded on the left; ``attention_mask`` is 0 at the padding.
        method: such as ``"local_leap(width=2)"``.
        temperature: 0 takes the most probable tokens; otherwise they are sampled, with ``generator``.
        on_step: gets, after each forward, what was committed and the answer so far ``(rows, max_new_tokens)`` with masks in it.

    Raises:
        LaconicError: for a model, method or prompt that cannot work, in one sentence.
    """
    chosen = _method(method)
    _check_model(model, chosen)
    pads = _check_prompt(model, ids, chosen, attention_mask, max_new_tokens, temperature)
    run = Run(model, ids, max_new_tokens, pads=pads, temperature=temperature, generator=generator, on_step=on_step)
    chosen.decode(run)
    return _result(run)


def _method(method: str | DiffusionMethod) -> DiffusionMethod:
    methods = Recipe.parse(method).methods
    if len(methods) != 1 or not isinstance(methods[0], DiffusionMethod):
        raise LaconicError(
            f"'{Recipe(methods)}' does not decode a diffusion model: give one method of its own, such as 'local_leap'."
        )
    return methods[0]


def _check_model(model: Any, method: DiffusionMethod) -> None:
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.startswith("DiffusionGemma"):
        raise LaconicError(
            f"{name} replaces random tokens and may change each of them until its last step, so there are no masks to commit: "
            "use its own generate."
        )
    if config is None or not hasattr(model, "generate"):
        raise LaconicError(f"{name} is not a causal language model of transformers: load one with laconic.load.")
    text = config.get_text_config()
    kind = getattr(text, "diffusion", None)
    if kind is None or getattr(text, "mask_token_id", None) is None:
        raise LaconicError(
            f"{name} is no diffusion model: give one such as the built-in 'mask', or, if it was trained to fill in masks, set "
            "config.diffusion to 'masked' or 'causal' and config.mask_token_id."
        )
    if kind != method.kind:
        fits = "causal attention, such as 'mask-causal'" if method.kind == "causal" else "full attention, such as 'mask'"
        raise LaconicError(f"{method.id} needs a model that fills in masks with {fits}, and this one is '{kind}': use another.")
    if config._attn_implementation not in ATTENTION:
        raise LaconicError(
            f"Attention '{config._attn_implementation}' takes no mask of ours: use sdpa or eager, outside of laconic.apply."
        )


def _check_prompt(
    model: Any, ids: torch.Tensor, method: DiffusionMethod, mask: torch.Tensor | None, new: int, temperature: float
) -> torch.Tensor | None:
    """The number of padding tokens of each row, or None where there are none."""
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise LaconicError("The prompt is empty or not of shape (rows, n): give at least one token per row.")
    if new < 1:
        raise LaconicError(f"max_new_tokens is {new}: give at least 1.")
    if not temperature >= 0:
        raise LaconicError(f"temperature is {temperature}: give 0 or more.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + new > longest:
        raise LaconicError(
            f"Prompt and answer have {ids.shape[1] + new} positions, and the model {longest}: lower max_new_tokens to "
            f"{max(0, longest - ids.shape[1])}, or shorten the prompt."
        )
    if len(ids) > 1 and not method.batches:
        raise LaconicError(f"{method.id} decodes one prompt at a time, as each has its own window: call it for every row.")
    if mask is None or bool(mask.all()):
        return None
    if mask.shape != ids.shape or bool((mask.diff(dim=-1) < 0).any()) or not bool(mask[:, -1].all()):
        raise LaconicError("The attention mask does not fit: give one of the prompt's shape, padded on the left.")
    if not method.batches:
        raise LaconicError(f"{method.id} takes no padding: leave it and the attention mask away.")
    return (mask == 0).sum(-1)


def _result(run: Run) -> Diffused:
    """The answers up to their end tokens."""
    new, ended = run.ids[:, run.start :].clone(), run.ended()
    lengths = torch.where(ended.any(-1), ended.int().argmax(-1) + 1, new.shape[1]).tolist()
    new = new[:, : max(lengths)]
    for row, length in enumerate(lengths):
        new[row, length:] = new[row, length - 1]
    return Diffused(new, lengths, run.forwards, run.rows, run.steps)
