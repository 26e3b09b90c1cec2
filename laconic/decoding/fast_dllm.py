"""Fast-dLLM: commits whatever is confident enough, and reuses keys and values within a block."""

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
class FastDLLM(BlockMethod):
    """Commits every position of the block whose token has a probability of ``threshold`` or more, and always the best one.

    With ``plan=prefix`` the keys and values before the block are those of its first step, with ``plan=dual`` those behind it too.
    """

    id: ClassVar[str] = "fast_dllm"
    paper: ClassVar[str] = (
        "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding (2025)"
    )

    threshold: float = parameter(
        0.9, "probability from which a token is committed; above 1 only the best one is", least=0, search=(0.75, 0.95))

    def rule(self, run: Run) -> Rule:
        return lambda seen: select(seen.probability, seen.open, threshold=self.threshold)
