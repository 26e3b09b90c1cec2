"""Speculative decoding: a small model drafts, the large one checks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import ClassVar

import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, Setting
from laconic.decoding.draft_model import DraftModelMethod, ModelDrafter
from laconic.decoding.tree import NONE, DraftTree, TreeShape
from laconic.decoding.verify import draw_distinct
from laconic.method import parameter
from laconic.registry import register


class FixedTree(ModelDrafter):
    """Level by level: every node of a level gets the same number of children."""

    method: Speculative

    def draft(self, scores: torch.Tensor, room: int) -> DraftTree:
        tokens, parents, laws = [self._tokens], [torch.full((1,), NONE)], []
        for depth, children in enumerate(self.method.levels[:room]):
            if depth:
                scores = self.grow(tokens[-1], parents[-1].expand(len(scores), -1))
            if self.draws:
                laws.append(self.setting.sampling.law(scores))
                best = draw_distinct(laws[-1], children, self.setting.generator)
            else:
                best = scores.topk(children, dim=-1).indices
            last, width = sum(map(len, parents)), len(parents[-1])
            parents.append(torch.arange(last - width, last).repeat_interleave(children))
            tokens.append(best.flatten(1))
            if self._unsure(laws[-1] if laws else scores, best, depth):
                break
        if laws:
            laws.append(torch.zeros_like(laws[0][:, :1]).expand(-1, len(parents[-1]), -1))
        shape = TreeShape(torch.cat(parents)[None]).expand(len(scores))
        return DraftTree(torch.cat(tokens, 1), shape, torch.cat(laws, 1) if laws else None)

    def _unsure(self, rows: torch.Tensor, best: torch.Tensor, depth: int) -> bool:
        """Whether the draft model nowhere in a level finds the tokens drafted there likely enough together to go on behind them.

        What was drawn so far decides, and nothing of it is taken back: the law of what comes out stays exact.

        Args:
            rows: ``(batch, nodes, vocabulary)``, the level's laws where tokens are drawn, else scores; best: its tokens.
        """
        if not self.method.confidence or depth + 1 == len(self.method.levels):
            return False
        likely = (rows if self.draws else rows.softmax(-1)).gather(-1, best).sum(-1).amax(-1)
        return all(done or sure < self.method.confidence for sure, done in zip(likely.tolist(), self.text.done, strict=True))


@register
@dataclass(frozen=True, kw_only=True)
class Speculative(DraftModelMethod):
    """A draft model writes the next few tokens, which the model checks in one forward: speculative decoding.

    A chain, or a fixed tree where ``branches`` says how many children the nodes of each level get, drawn without replacement
    (SpecInfer, Sequoia, 2024). A forward of the draft model per level, as long as it is sure enough that one of some node's
    children is right.
    """

    id: ClassVar[str] = "speculative"
    paper: ClassVar[str] = "Fast Inference from Transformers via Speculative Decoding (2023)"
    verifiers: ClassVar[tuple[str, ...]] = ("rejection", "match", "typical")

    budget: Budget = parameter(Budget(amount=4), "tokens drafted in each forward")  # noqa: RUF009
    branches: str = parameter("", "children of the nodes of each level, such as 4x2x1x1; empty for a chain", search=())
    confidence: float = parameter(
        0.4, "drafts end behind tokens that are less likely together than this; 0: never", search=(), least=0.0
    )

    def check(self) -> None:
        self.require(self.confidence <= 1, "confidence is a probability: give at most 1.")
        counts = self.branches.split("x") if self.branches else []
        self.require(all(c.isascii() and c.isdigit() and int(c) for c in counts), "branches are counts such as 4x2x1x1.")
        size = sum(accumulate(map(int, counts), mul))
        fits = self.nodes is None or size <= self.nodes  # None: a share, which is refused for itself
        self.require(fits, f"branches={self.branches} are {size} tokens: give a budget of {size}.")

    @property
    def levels(self) -> list[int]:
        """Children of the nodes of each level."""
        return [int(count) for count in self.branches.split("x")] if self.branches else [1] * self.nodes

    def drafter(self, setting: Setting) -> Drafter:
        self.require(max(self.levels) <= setting.vocabulary, "there are more branches than tokens: use fewer.")
        return FixedTree(self, setting)
