"""Full canvas: one token per step, everything computed anew, which the others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from laconic.decoding.canvas import Run
from laconic.decoding.diffusion import BlockMethod, Rule
from laconic.decoding.positions import select
from laconic.method import parameter
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class FullCanvas(BlockMethod):
    """Commits the most confident position of the block at every step, and by default computes the whole canvas: the reference.

    ``per_step`` above 1 is the plain way to fewer steps: so many of the most confident ones, however unsure. Confidence is the
    probability of the token. One forward per ``per_step`` new tokens, each over prompt and answer unless ``plan`` says otherwise.
    """

    id: ClassVar[str] = "full_canvas"
    paper: ClassVar[str] = "Large Language Diffusion Models (LLaDA, 2025)"

    per_step: int = parameter(1, "positions that each step commits", least=1)

    def rule(self, run: Run) -> Rule:
        return lambda seen: select(seen.probability, seen.open, least=self.per_step)
