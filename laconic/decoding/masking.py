"""Masking: every token of the vocabulary is tested at every step, or the grammar's automaton says them all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.decoding.constraints import Constraint, State
from laconic.decoding.particles import Draw, ParticleMethod
from laconic.decoding.verify import draw
from laconic.method import parameter
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Masking(ParticleMethod):
    """Draws among the tokens that the constraint allows: what constrained decoding usually is.

    Without weights its law is not the model's: texts that run into rare endings are too likely. With ``proper_weights`` a step
    weighs as much as the probability of all tokens that were allowed. ``whole`` takes the mask of a grammar from its library,
    which is one check; otherwise, and for Python predicates, each token is tested.
    """

    id: ClassVar[str] = "masking"
    paper: ClassVar[str] = "Guiding LLMs The Right Way: Fast, Non-Invasive Constrained Generation (2024)"

    proper_weights: bool = parameter(False, "weigh particles; without, the law is that of local masking")
    whole: bool = parameter(True, "ask a grammar for its whole mask at once")

    def draw(
        self, logs: torch.Tensor, states: Sequence[State], constraint: Constraint, generator: torch.Generator
    ) -> list[Draw]:  # fmt: skip
        masks = torch.zeros(logs.shape, dtype=torch.bool)
        checks = []
        for row, state in enumerate(states):
            mask = torch.from_numpy(state.mask() if self.whole else state.test_all())[: logs.shape[-1]]
            masks[row, : len(mask)] = mask
            checks.append(state.mask_checks if self.whole else len(mask))
        logs = logs.masked_fill(~masks, float("-inf"))
        total = logs.logsumexp(-1).tolist()
        tokens = draw(logs.exp(), generator).tolist()
        return [
            Draw(None, -math.inf, count) if mass == -math.inf else Draw(token, mass if self.proper_weights else 0.0, count)
            for token, mass, count in zip(tokens, total, checks, strict=True)
        ]
