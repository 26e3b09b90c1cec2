"""SpecTr: several drafts at once, one of which is taken so that the law stays the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, Setting
from laconic.decoding.draft_model import DraftModelMethod, ModelDrafter
from laconic.decoding.tree import NONE, DraftTree, TreeShape
from laconic.decoding.verify import draw
from laconic.method import parameter
from laconic.registry import register


class Drafts(ModelDrafter):
    method: SpecTr

    def draft(self, scores: torch.Tensor, room: int) -> DraftTree:
        """Level by level, all drafts of all rows in one forward; drafts that agree so far are one node."""
        count = self.method.drafts
        length = min(self.method.nodes // count, room)
        self.tokens, self.parents, self.laws = [self._tokens], [self._parents], []
        self.at = torch.zeros(len(scores), count, dtype=torch.int64, device=scores.device)  # the newest node of each draft
        return self._draw(scores, length) if self.draws else self._beams(scores, length)

    def _draw(self, scores: torch.Tensor, length: int) -> DraftTree:
        """Drafts drawn independently."""
        paths = []
        for depth in range(length):
            scores = self.grow(self.tokens[-1], self.parents[-1]) if depth else scores
            self.laws.append(self.setting.sampling.law(scores))
            each = self._newest(self.laws[-1])
            fresh = draw(each, self.setting.generator)
            self._add(fresh)
            paths.append(self.at)
        self.laws.append(torch.zeros_like(self.laws[0][:, :1]).expand(-1, self.tokens[-1].shape[1], -1))
        return self._tree(torch.cat(self.laws, 1), torch.stack(paths, -1))

    def _beams(self, scores: torch.Tensor, length: int) -> DraftTree:
        """The likeliest continuations of each length, for verifiers that ask for no draws."""
        worth = torch.zeros_like(self.at[:, :1], dtype=torch.float32)
        for depth in range(length):
            scores = self.grow(self.tokens[-1], self.parents[-1]) if depth else scores
            total = worth[..., None] + scores.log_softmax(-1)
            worth, best = total.flatten(1).topk(min(self.method.drafts, total[0].numel()), dim=-1)
            vocabulary = scores.shape[-1]
            self.at = self._first + best // vocabulary
            self._add(best % vocabulary)
        return self._tree()

    @property
    def _first(self) -> int:
        """The first node of the newest level."""
        return sum(level.shape[1] for level in self.tokens[:-1])

    def _newest(self, level: torch.Tensor) -> torch.Tensor:
        """Of values ``(batch, nodes, vocabulary)`` of the newest level those of each draft."""
        return level.gather(1, (self.at - self._first)[..., None].expand(-1, -1, level.shape[-1]))

    def _add(self, fresh: torch.Tensor) -> None:
        """One more token ``(batch, drafts)`` to each draft: a level of nodes, empty ones behind where a row has fewer."""
        same = (self.at[:, :, None] == self.at[:, None]) & (fresh[:, :, None] == fresh[:, None])
        leader = same.int().argmax(-1)  # the first draft that has come the same way
        leads = leader == torch.arange(fresh.shape[1], device=fresh.device)
        rank = leads.cumsum(-1) - 1
        width = int(rank.max()) + 1
        start = self._first + self.tokens[-1].shape[1]
        slot = torch.where(leads, rank, width)  # what does not lead is put aside, in a column that is cut off
        tokens = torch.zeros(len(fresh), width + 1, dtype=torch.int64, device=fresh.device)
        parents = torch.full_like(tokens, NONE).scatter(1, slot, self.at)[:, :width].cpu()
        self.tokens.append(tokens.scatter(1, slot, fresh)[:, :width])
        self.parents.append(parents)
        self.at = start + rank.gather(1, leader)

    def _tree(self, laws: torch.Tensor | None = None, drafts: torch.Tensor | None = None) -> DraftTree:
        return DraftTree(torch.cat(self.tokens, 1), TreeShape(torch.cat(self.parents, 1)), laws, drafts)


@register
@dataclass(frozen=True, kw_only=True)
class SpecTr(DraftModelMethod):
    """A draft model writes several drafts independently, and one of them is taken by optimal transport (k-SEQ).

    At every place the drafts that agree with what is accepted offer their tokens, and one is accepted at least 1 - 1/e as often
    as is possible at all. Drafts have budget / ``drafts`` tokens each; what they share is computed once. At temperature 0, where
    all would be the same, they are the likeliest continuations instead, by beam search.
    """

    id: ClassVar[str] = "spectr"
    paper: ClassVar[str] = "SpecTr: Fast Speculative Decoding via Optimal Transport (2023)"
    verifiers: ClassVar[tuple[str, ...]] = ("k_seq", "match", "typical")

    budget: Budget = parameter(Budget(amount=32), "tokens drafted in each forward, over all drafts")  # noqa: RUF009
    drafts: int = parameter(8, "drafts written in parallel; each gets its share of the budget", least=1)

    def check(self) -> None:
        fits = self.nodes is None or self.drafts <= self.nodes  # None: a share, which is refused for itself
        self.require(fits, f"{self.drafts} drafts need a budget of {self.drafts} tokens or more.")

    def drafter(self, setting: Setting) -> Drafter:
        return Drafts(self, setting)
