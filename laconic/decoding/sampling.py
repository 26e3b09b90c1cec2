"""What is drawn from: logits, changed by processors, temperature, top-k and top-p, alike for drafts and for the target model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from laconic.decoding.tree import DraftTree
from laconic.decoding.verify import draw
from laconic.errors import LaconicError
from laconic.kernels import argmax


class Text:
    """The texts of a batch while they are written.

    Attributes:
        rows: token ids of each, from the prompt on to the newest token, which no forward has seen yet.
        prompts: tokens of each prompt.
        done: which rows are finished.
    """

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.prompts = [len(row) for row in rows]
        self.done = [False] * len(rows)
        self._seen: torch.Tensor | None = None
        self._counted = [0] * len(rows)

    def written(self, row: int) -> int:
        """New tokens of a row."""
        return len(self.rows[row]) - self.prompts[row]

    def roots(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The newest tokens, ``(batch,)``."""
        return torch.tensor([row[-1] for row in self.rows], device=device)

    def seen(self, vocabulary: int, device: torch.device | str) -> torch.Tensor:
        """Boolean ``(batch, vocabulary)``: which tokens stand in each text. Kept up to date at the price of the new tokens."""
        if self._seen is None:
            self._seen = torch.zeros(len(self.rows), vocabulary, dtype=torch.bool, device=device)
        for row, ids in enumerate(self.rows):
            fresh = ids[self._counted[row] :]
            if fresh:
                self._seen[row, torch.tensor(fresh, device=device)] = True
                self._counted[row] = len(ids)
        return self._seen


Processor = Callable[[torch.Tensor, Text, DraftTree], torch.Tensor]
"""Changes logits ``(batch, nodes, vocabulary)`` after each node of a tree, whose root is the newest token of the text."""


def repetition_penalty(penalty: float) -> Processor:
    """Divides the logits of tokens that the text, the way to the node included, has already, or multiplies negative ones
    (CTRL, 2019)."""

    def process(logits: torch.Tensor, text: Text, tree: DraftTree) -> torch.Tensor:
        seen = text.seen(logits.shape[-1], logits.device)[:, None].expand(logits.shape).clone()
        way = torch.where(tree.shape.ancestors, tree.tokens[:, None], tree.tokens[:, :1, None])
        seen.scatter_(2, way.to(seen.device), True)
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    return process


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. In this order: ``processors``, temperature, top-k, top-p, as in transformers.

    Attributes:
        temperature: 0 is greedy; then top-k and top-p say nothing.
        top_k: 0 for all; top_p: 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise LaconicError("Sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def scores(self, logits: torch.Tensor, text: Text, tree: DraftTree) -> torch.Tensor:
        """Logits ``(batch, nodes, vocabulary)`` as the processors leave them, float32."""
        logits = logits.float()
        for process in self.processors:
            logits = process(logits, text, tree)
        return logits

    def law(self, scores: torch.Tensor) -> torch.Tensor:
        """Probabilities ``(..., vocabulary)`` that tokens are drawn with; one-hot when greedy."""
        if self.greedy:
            return torch.nn.functional.one_hot(argmax(scores), scores.shape[-1]).to(scores.dtype)
        return self.soft(scores, self.temperature)

    def soft(self, scores: torch.Tensor, temperature: float) -> torch.Tensor:
        """As ``law`` at another temperature above 0."""
        scores = scores / temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        law = scores.softmax(-1)
        if self.top_p < 1:
            ordered, order = law.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p  # the likeliest always stays
            law = law.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
            law = law / law.sum(-1, keepdim=True)
        return law

    def choose(self, scores: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """One token after each node, ``(batch, nodes)``: the likeliest, or one sample."""
        return argmax(scores) if self.greedy else draw(self.law(scores), generator)
