"""Token Recycling: what the model nearly said after each token, said again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, DraftMethod, Setting, Step
from laconic.decoding.sampling import Text
from laconic.decoding.templates import best_tree, fill
from laconic.decoding.tree import DraftTree
from laconic.method import parameter
from laconic.registry import register

# How often the successor of each rank is the next token, one row per depth, falling as in Zipf's law: the tree of 80 nodes that
# follows from it has levels of 8, 23, 25, 17, 6 and 1 nodes, where the original's template has 8, 21, 25, 15, 8 and 3.
HITS = ((*(0.45 * rank**-1.6 for rank in range(1, 9)),),) * 6


class _Recycler(Drafter):
    def __init__(self, method: TokenRecycling, setting: Setting) -> None:
        super().__init__(method, setting)
        size = (setting.vocabulary, min(method.successors, setting.vocabulary))
        self.table = torch.zeros(size, dtype=torch.int32, device=setting.model.device)
        if method.prompt:
            self._learn_prompt()

    def propose(self, text: Text, room: int) -> DraftTree:
        shape = best_tree(tuple(row[: self.table.shape[1]] for row in HITS[:room]), self.method.nodes)
        tokens = fill(shape.to(self.table.device), text.roots(self.table.device), self.table)
        return DraftTree(tokens, shape.expand(len(text.rows)))

    def observe(self, step: Step, text: Text) -> None:
        """Every node of the tree teaches its successors. Of equal tokens the last accepted one counts, else the last: a plain
        scatter would leave it to chance."""
        best = step.scores.topk(self.table.shape[1], dim=-1).indices.to(torch.int32)
        rank = torch.arange(step.tree.nodes, device=best.device).expand(step.tree.tokens.shape).clone()
        path = step.verdict.path
        rank.scatter_add_(1, path.clamp(min=0), torch.where(path >= 0, step.tree.nodes, 0))
        order = rank.flatten().argsort(stable=True)
        tokens, best = step.tree.tokens.flatten()[order], best.flatten(0, 1)[order]
        winner = torch.full((self.table.shape[0],), -1, device=best.device)
        winner.scatter_reduce_(0, tokens, torch.arange(len(tokens), device=best.device), "amax")
        self.table[tokens] = best[winner[tokens]]

    def _learn_prompt(self) -> None:
        """Pairs of neighbours in the prompts: the newest follower of each token comes first."""
        for ids in self.setting.text.rows:
            for token, follower in pairwise(ids):
                row = self.table[token].tolist()
                row = [follower, *(other for other in row if other != follower)]
                self.table[token] = torch.tensor(row[: self.table.shape[1]], dtype=torch.int32)

    @property
    def bytes(self) -> int:
        return self.table.numel() * self.table.element_size()


@register
@dataclass(frozen=True, kw_only=True)
class TokenRecycling(DraftMethod):
    """Remembers the likeliest successors of every token that a forward met, and drafts a fixed tree from that table.

    No model and no training. The table takes vocabulary x ``successors`` x 4 bytes, is shared by the rows of a batch, and lives
    on in ``Decoded.drafter``. The tree holds the rank paths that are worth most.
    """

    id: ClassVar[str] = "token_recycling"
    paper: ClassVar[str] = "Turning Trash into Treasure: Accelerating Inference of LLMs with Token Recycling (2024)"

    budget: Budget = parameter(Budget(amount=24), "tokens drafted in each forward; the original drafts 80")  # noqa: RUF009
    successors: int = parameter(8, "successors remembered of each token", least=1)
    prompt: bool = parameter(False, "learn from neighbours in the prompt before the first draft")

    def drafter(self, setting: Setting) -> Drafter:
        return _Recycler(self, setting)
