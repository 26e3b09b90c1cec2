"""LocalLeap: near a very confident token, moderately confident ones are committed too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.decoding.canvas import Prediction, Run
from laconic.decoding.diffusion import BlockMethod, Rule
from laconic.decoding.positions import select
from laconic.method import parameter
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class LocalLeap(BlockMethod):
    """Commits what reaches ``threshold``, and within ``width`` positions of it what reaches ``relaxed``; always the best one.

    Equals ``fast_dllm`` at ``width=0`` or ``relaxed=threshold``. Short answers gain little.
    """

    id: ClassVar[str] = "local_leap"
    paper: ClassVar[str] = "Accelerating Diffusion LLM Inference via Local Determinism Propagation (2025)"

    threshold: float = parameter(0.9, "probability of an anchor", least=0, search=(0.8, 0.95))
    relaxed: float = parameter(0.75, "probability that suffices near an anchor", least=0, search=(0.6, 0.85))
    width: int = parameter(4, "how many positions away from an anchor is near", least=0, search=(2, 8))
    old_anchors: bool = parameter(False, "tokens of the block committed in earlier steps are anchors too")

    def check(self) -> None:
        super().check()
        self.require(
            self.relaxed <= self.threshold, f"relaxed={self.relaxed} exceeds threshold={self.threshold}: give a lower one."
        )

    def rule(self, run: Run) -> Rule:
        return self._choose

    def _choose(self, seen: Prediction) -> torch.Tensor:
        score = seen.probability
        anchors = seen.open & (score >= self.threshold)
        if self.old_anchors:
            anchors = anchors | ~seen.open
        return select(
            score, seen.open, threshold=self.threshold, relaxed=self.relaxed, width=self.width, anchors=anchors
        )
