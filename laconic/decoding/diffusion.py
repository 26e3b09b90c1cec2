"""What every method for diffusion language models shares, and the block-wise decoding of most of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.decoding.canvas import Prediction, Run
from laconic.method import Method, parameter

PLANS = ("none", "prefix", "dual")
Rule = Callable[[Prediction], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DiffusionMethod(Method):
    """A way to fill in the masks of a diffusion language model. ``laconic.decoding.diffuse`` runs it.

    Attributes:
        kind: what ``config.diffusion`` of its models says: "masked" (everything sees everything) or "causal".
        batches: whether it decodes several rows at once.
    """

    stage: ClassVar[str] = "sample"
    takes_budget: ClassVar[bool] = False
    kind: ClassVar[str] = "masked"
    batches: ClassVar[bool] = True

    def decode(self, run: Run) -> None:
        """Fills in all masks of the canvas, or ends earlier where the text has ended."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BlockMethod(DiffusionMethod):
    """Decodes one block after the other, as LLaDA (2025) does. A subclass says which positions of the block a step commits."""

    block: int = parameter(32, "positions that are decoded together, from left to right", least=1)
    plan: str = parameter(
        "none", "what is reused within a block: none; prefix (keys before it); dual (all other keys)", search=PLANS)
    early_stop: bool = parameter(True, "a block that ends the text is the last one", search=())

    def check(self) -> None:
        self.require(self.plan in PLANS, f"there is no plan '{self.plan}': use {', '.join(PLANS)}.")

    def rule(self, run: Run) -> Rule:
        """For a request, what chooses the positions (rows, n), bool, that are committed after each forward."""
        raise NotImplementedError

    def after(self, run: Run, seen: Prediction, taken: torch.Tensor) -> None:
        """Called when ``taken`` has been committed."""

    def decode(self, run: Run) -> None:
        self.decode_with(run, self.rule(run))

    def decode_with(self, run: Run, rule: Rule) -> None:
        """Decodes block after block; ``rule`` says what is committed."""
        start = run.start
        while start < run.length and not (self.early_stop and run.finish()):
            self._fill(run, rule, start)
            start += self.block

    def _fill(self, run: Run, rule: Rule, start: int) -> None:
        """Decodes the block at ``start``."""
        fresh = True
        while bool(run.open[:, start : start + self.block].any()):
            stop = min(start + self.block, run.length)
            first = 0 if fresh or self.plan == "none" else start
            last = stop if self.plan == "dual" and not fresh else run.length
            place = torch.arange(run.length, device=run.ids.device)
            seen = run.predict(place[first:last], slice(0, run.length), place[start : self.sight(run, stop)])
            taken = rule(seen)
            run.commit(seen, taken)
            self.after(run, seen, taken)
            fresh = False

    def sight(self, run: Run, stop: int) -> int:
        """Up to where predictions are wanted; ``stop`` is where the block ends."""
        return stop
