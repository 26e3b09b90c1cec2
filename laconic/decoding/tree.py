"""Draft trees: what is proposed after the newest token of each row of a batch, and who stands before whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

NONE = -1


@dataclass(frozen=True, eq=False)
class TreeShape:
    """Who follows whom: the shape of a draft tree without its tokens, so that a fixed tree is worked out once.

    Attributes:
        parents: int64 ``(batch, nodes)``, -1 for the root, which is node 0, and for empty nodes, which only fill up the batch;
            a parent stands before its children.
    """

    parents: torch.Tensor

    @classmethod
    def chain(cls, length: int, batch: int = 1, device: torch.device | str = "cpu") -> TreeShape:
        """The root and ``length`` tokens one after another."""
        return cls(torch.arange(NONE, length, device=device).expand(batch, -1))

    @classmethod
    def of_paths(cls, paths: Sequence[Sequence[int]]) -> TreeShape:
        """A fixed tree from its rank paths: ``[0, 2]`` is the third child of the best child. Nodes stand level by level.

        Every prefix of a path has to be there as well.
        """
        order = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        place = {(): 0} | {path: i + 1 for i, path in enumerate(order)}
        return cls(torch.tensor([[NONE] + [place[path[:-1]] for path in order]]))

    @property
    def nodes(self) -> int:
        return self.parents.shape[1]

    @cached_property
    def real(self) -> torch.Tensor:
        """Boolean ``(batch, nodes)``: the nodes that are not empty."""
        real = self.parents >= 0
        real[:, 0] = True
        return real

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """Boolean ``(batch, nodes, nodes)``: whether the second is the first or stands before it; nothing of empty nodes."""
        if torch.equal(self.parents, torch.arange(NONE, self.nodes - 1, device=self.parents.device).expand_as(self.parents)):
            chain = torch.ones(self.nodes, self.nodes, dtype=torch.bool, device=self.parents.device).tril()
            return chain.expand(*self.parents.shape, -1)
        seen = torch.eye(self.nodes, dtype=torch.bool, device=self.parents.device).expand(*self.parents.shape, -1).clone()
        above = self.parents
        while bool((above >= 0).any()):
            at = above.clamp(min=0)
            seen |= torch.nn.functional.one_hot(at, self.nodes).bool() & (above >= 0)[..., None]
            above = torch.where(above >= 0, self.parents.gather(1, at), NONE)
        return seen & self.real[..., None]

    @cached_property
    def depths(self) -> torch.Tensor:
        """int64 ``(batch, nodes)``: tokens between the root and each node, itself included; -1 for empty nodes."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def depth(self) -> int:
        """Of the deepest node of all rows."""
        return int(self.depths.max())

    @cached_property
    def ranks(self) -> torch.Tensor:
        """int64 ``(batch, nodes)``: how many siblings stand before each node."""
        same = self.parents[:, :, None] == self.parents[:, None, :]
        return same.tril(-1).sum(-1).masked_fill(~self.real, 0)

    @cached_property
    def children(self) -> torch.Tensor:
        """int64 ``(batch, nodes, most children)``: the children of each node in order, -1 behind the last."""
        real = self.parents >= 0
        most = int((self.ranks * real).max()) + 1 if bool(real.any()) else 1
        table = self.parents.new_full((*self.parents.shape, most), NONE)
        row, node = real.nonzero(as_tuple=True)
        table[row, self.parents[row, node], self.ranks[row, node]] = node
        return table

    @cached_property
    def levels(self) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Of a shape alike in all rows, whose nodes stand level by level: the nodes of each level below the root, their parents
        and their ranks."""
        depths = self.depths[0].tolist()
        starts = [i for i in range(1, len(depths)) if depths[i] != depths[i - 1]]
        levels = [slice(first, last) for first, last in zip(starts, [*starts[1:], len(depths)], strict=True)]
        return [(at, self.parents[0, at], self.ranks[0, at]) for at in levels]

    def to(self, device: torch.device | str) -> TreeShape:
        if self.parents.device == torch.device(device):
            return self
        if str(device) not in self._copies:
            self._copies[str(device)] = TreeShape(self.parents.to(device))
        return self._copies[str(device)]

    @cached_property
    def _copies(self) -> dict[str | int, TreeShape]:
        """The same shape on other devices and for other batches: what is worked out of a fixed one stays."""
        return {}

    def expand(self, batch: int) -> TreeShape:
        """The same shape in every row of a batch."""
        if batch == len(self.parents):
            return self
        if batch in self._copies:
            return self._copies[batch]
        grown = self._copies[batch] = TreeShape(self.parents.expand(batch, -1))
        for name in ("real", "ancestors", "depths", "ranks", "children"):  # worked out once for all
            grown.__dict__[name] = getattr(self, name).expand(batch, *(-1,) * (getattr(self, name).dim() - 1))
        grown.__dict__["depth"] = self.depth
        return grown

    def paths(self, ends: torch.Tensor) -> torch.Tensor:
        """Nodes from the root to the nodes ``ends`` (batch,): int64 ``(batch, depth + 1)``, -1 behind the end."""
        row = torch.arange(len(ends), device=ends.device)
        node = torch.arange(self.nodes, device=ends.device)
        path = torch.where(self.ancestors[row, ends], node, self.nodes).sort(-1).values[:, : self.depth + 1]
        return path.masked_fill(path == self.nodes, NONE)


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Rows that a forward computes behind the nodes of a draft: no tokens but embeddings. They are never accepted; what the model
    says there is for the drafter.

    Attributes:
        shape: of the nodes and, behind them, of these rows, each of which hangs on a node or on an earlier row.
        embeddings: ``(batch, rows, hidden)``, as the model's own table gives them.
    """

    shape: TreeShape
    embeddings: torch.Tensor


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Tokens on a shape.

    Attributes:
        tokens: int64 ``(batch, nodes)``; that of the root is the newest token of the text.
        laws: float ``(batch, nodes, vocabulary)``: what the children of each node were drawn from, for verifiers that ask;
            rows of leaves mean nothing.
        drafts: int64 ``(batch, drafts, length)``: the node of each token of each draft, where whole drafts were drawn
            independently and share nodes; -1 behind the last.
        prompts: rows without tokens that the same forward computes.
    """

    tokens: torch.Tensor
    shape: TreeShape
    laws: torch.Tensor | None = None
    drafts: torch.Tensor | None = None
    prompts: PromptRows | None = None

    @classmethod
    def chain(cls, tokens: torch.Tensor, laws: torch.Tensor | None = None) -> DraftTree:
        """One token after another, ``(batch, nodes)``, the root first."""
        return cls(tokens, TreeShape.chain(tokens.shape[1] - 1, len(tokens), tokens.device), laws)

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu") -> DraftTree:
        """From one list of tokens and one of parents per row; shorter rows are filled up with empty nodes."""
        nodes = max(len(tokens) for tokens, _ in rows)
        tokens = [[*tokens, *[0] * (nodes - len(tokens))] for tokens, _ in rows]
        parents = [[*parents, *[NONE] * (nodes - len(parents))] for _, parents in rows]
        return cls(torch.tensor(tokens, device=device), TreeShape(torch.tensor(parents, device=device)))

    @property
    def nodes(self) -> int:
        return self.shape.nodes

    def to(self, device: torch.device | str) -> DraftTree:
        """The same tree with its tokens and shape on ``device``, where the model's output is."""
        if self.tokens.device == self.shape.parents.device == torch.device(device):
            return self
        return dataclasses.replace(self, tokens=self.tokens.to(device), shape=self.shape.to(device))

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the newest token."""
        return self.nodes == 1 and self.prompts is None


def trie(root: int, continuations: Sequence[Sequence[int]], limit: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of a tree in which continuations that begin alike share nodes, earlier ones first.

    ``limit``: the most nodes behind the root.
    """
    tokens, parents, known = [root], [NONE], {}
    for continuation in continuations:
        at = 0
        for token in continuation:
            if (at, token) not in known:
                if len(tokens) > limit:
                    return tokens, parents
                known[at, token] = len(tokens)
                tokens.append(token)
                parents.append(at)
            at = known[at, token]
    return tokens, parents
