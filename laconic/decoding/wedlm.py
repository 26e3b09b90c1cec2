"""WeDLM: known tokens are moved in front of the masks, so that causal attention and an ordinary KV cache decode in parallel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.decoding.canvas import Run
from laconic.decoding.diffusion import DiffusionMethod
from laconic.decoding.positions import select
from laconic.method import parameter
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class WeDLM(DiffusionMethod):
    """Fills every mask of a sliding window whose entropy, plus a price for its distance, is low; always the lowest one.

    A forward takes the tokens of the window that are known, then ``window`` or fewer masks, at their true positions, behind the
    cache: a mask sees all that is known. Known tokens without a mask to their left are in the cache for good after it. Needs a
    causal model that was trained to fill in masks (``config.diffusion = "causal"``), such as `mask-causal`. What lies behind an
    end token is dropped as soon as one is filled in.
    """

    id: ClassVar[str] = "wedlm"
    paper: ClassVar[str] = (
        "WeDLM: Reconciling Diffusion Language Models with Standard Causal Attention for Fast Inference (2025)"
    )
    needs: ClassVar[str] = "training"
    kind: ClassVar[str] = "causal"
    batches: ClassVar[bool] = False

    window: int = parameter(16, "masks at the end of every forward", least=1, search=(8, 32))
    entropy: float = parameter(0.4, "nats below which a mask is filled; 0 fills one at a time", least=0, search=(0.2, 0.6))
    distance: float = parameter(0.02, "nats added per position behind the first mask", least=0, search=(0.05, 0.1))
    contiguous: bool = parameter(False, "fill only a run that starts at the first mask, as Lexical Unit Decoding does")

    def decode(self, run: Run) -> None:
        place = torch.arange(run.start, device=run.ids.device)
        prompt = slice(0, run.start)
        run.forward(run.ids[:, prompt], place, write=prompt, read=prompt, bias=None, keep=place[:0])
        done = run.start
        while done is not None:
            done = self.advance(run, done)

    def advance(self, run: Run, done: int) -> int | None:
        """One forward behind ``done`` cached positions. Returns how many are cached then, or None when the text is complete.

        The window begins where the cache ends, and reaches ``window`` positions beyond its front run of known tokens.
        """
        front = int(run.open[0, done:].int().argmax())
        place = torch.arange(done, min(done + front + self.window, run.length), device=run.ids.device)
        hidden = run.open[0, place]
        place = place[hidden.int().argsort(dim=0, stable=True)]  # what is known, then the masks
        count, masks = len(place), int(hidden.sum())
        logits = run.forward(
            run.ids[:, place], place, write=slice(done, done + count), read=slice(0, done + count),
            bias=_causal(run, done, count), keep=torch.arange(count - masks, count, device=place.device),
        )  # fmt: skip
        seen = run.prediction(place[count - masks :], logits)
        taken = select(
            seen.certainty, seen.open, threshold=-self.entropy if self.entropy else math.inf, penalty=self.distance,
            places=seen.positions, contiguous=self.contiguous,
        )  # fmt: skip
        run.commit(seen, taken)
        return None if self._complete(run) else done + front

    def _complete(self, run: Run) -> bool:
        """Whether nothing is masked up to the first end token; what lies behind it is cut off, masked or not."""
        ends = run.ended()[0].nonzero()[:, 0]
        if len(ends):
            run.cut(run.start + int(ends[0]) + 1)
        return not bool(run.open.any())


def _causal(run: Run, before: int, count: int) -> torch.Tensor:
    """Zero where a new row sees a slot of the cache: all ``before`` it, and the new ones up to itself; else the lowest value."""
    later = torch.ones(count, before + count, dtype=torch.bool, device=run.ids.device).triu(before + 1)
    return torch.zeros(later.shape, dtype=run.model.dtype, device=later.device).masked_fill(
        later, torch.finfo(run.model.dtype).min
    )[None, None]
