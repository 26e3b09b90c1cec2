"""DySpec: a draft tree that grows where the draft model is sure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, Setting
from laconic.decoding.draft_model import DraftModelMethod, ModelDrafter
from laconic.decoding.tree import NONE, DraftTree, TreeShape
from laconic.decoding.verify import draw_distinct
from laconic.method import parameter
from laconic.registry import register


@dataclass
class _Children:
    """What the draft model says after a node: its candidates in the order of drawing, and what is left behind those drawn.

    Attributes:
        place: the node's number in the order of reading.
        mass: probability of the tokens that are not drawn yet; squares: sum of their squared probabilities.
    """

    place: int
    tokens: list[int]
    chances: list[float]
    mass: float
    squares: float


@dataclass
class _Growth:
    """The tree of one row. A slot is the next child of a node; its value is how likely verification gets there.

    ``ready``: slots of nodes that the draft model has read; ``unread``: first slots of the other nodes, with the most that they
    can be worth. Entries are (-worth, order of coming, node).
    """

    method: DySpec
    room: int
    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [NONE])
    values: list[float] = field(default_factory=lambda: [1.0])
    depths: list[int] = field(default_factory=lambda: [0])
    children: dict[int, _Children] = field(default_factory=dict)
    ready: list[tuple[float, int, int]] = field(default_factory=list)
    unread: list[tuple[float, int, int]] = field(default_factory=list)
    came: int = 0

    @property
    def left(self) -> int:
        return self.method.nodes + 1 - len(self.tokens)

    def read(self, node: int, children: _Children) -> None:
        """Tells what may follow a node."""
        self.children[node] = children
        self._open(node)

    def grow(self) -> list[int]:
        """Draws children until the tree is full or hangs on nodes that have to be read: these."""
        least, level = self.method.threshold, self.method.threshold > 0
        while self.left and self.ready and -self.ready[0][0] > least and (level or self.ready[:1] < (self.unread[:1] or [(1.0,)])):
            self._draw(heapq.heappop(self.ready)[2])
        if not self.left:
            return []
        wanted = [entry for entry in self.unread if -entry[0] > least]
        if not level:  # of all slots only the best can still be taken, as many as there is room for
            wanted = [entry for entry in heapq.nsmallest(self.left, self.ready + wanted) if entry[2] not in self.children]
        chosen = {entry[2] for entry in wanted}
        self.unread = [entry for entry in self.unread if entry[2] not in chosen]
        heapq.heapify(self.unread)
        return sorted(chosen)

    def _draw(self, node: int) -> None:
        here = self.children[node]
        rank = len(here.tokens) - len(here.chances)
        chance = here.chances.pop(0)
        here.mass, here.squares = here.mass - chance, here.squares - chance * chance
        child = len(self.tokens)
        self.tokens.append(here.tokens[rank])
        self.parents.append(node)
        self.values.append(self.values[node] * chance)
        self.depths.append(self.depths[node] + 1)
        self._open(node)
        if self.depths[child] < self.room:
            self.came += 1
            heapq.heappush(self.unread, (-self.values[child], self.came, child))

    def _open(self, node: int) -> None:
        """The slot of the next child, if there is any probability left for one."""
        here = self.children[node]
        if here.chances and here.chances[0] > 0:
            expected = self.method.slot_value == "expected"
            worth = here.squares / max(here.mass, 1e-12) if expected else here.mass
            self.came += 1
            heapq.heappush(self.ready, (-self.values[node] * worth, self.came, node))


class _Best(ModelDrafter):
    method: DySpec

    def draft(self, scores: torch.Tensor, room: int) -> DraftTree:
        text = self.text
        rows = [_Growth(self.method, room, ids[-1:]) for ids in text.rows]
        wanted = [[] if done else [0] for done in text.done]
        laws, place = [], 0
        while True:
            laws.append(self._law(scores))
            self._tell(rows, wanted, laws[-1], place)
            place += scores.shape[1]
            wanted = [growth.grow() if growth.children else [] for growth in rows]
            if not any(wanted):
                return self._tree(rows, torch.cat(laws, 1))
            scores = self.grow(*self._level(rows, wanted))

    def _law(self, scores: torch.Tensor) -> torch.Tensor:
        """A greedy target has one likely token only; the draft model's law says how sure that is."""
        greedy = self.setting.sampling.greedy
        return (scores / self.method.temperature).softmax(-1) if greedy else self.setting.sampling.law(scores)

    def _tell(self, rows: list[_Growth], wanted: list[list[int]], law: torch.Tensor, place: int) -> None:
        """Hands each row what follows the nodes that it wanted to be read, from ``place`` on."""
        count = min(self.method.nodes, law.shape[-1])
        tokens = draw_distinct(law, count, self.setting.generator) if self.draws else law.topk(count, dim=-1).indices
        chances, squares = law.gather(-1, tokens).tolist(), law.square().sum(-1).tolist()
        tokens = tokens.tolist()
        for row, nodes in enumerate(wanted):
            for i, node in enumerate(nodes):
                rows[row].read(node, _Children(place + i, tokens[row][i], chances[row][i], 1.0, squares[row][i]))

    def _level(self, rows: list[_Growth], wanted: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and parents of the nodes to be read, in the order of reading; empty nodes behind where a row wants fewer."""
        width = max(map(len, wanted))
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        parents = torch.full((len(rows), width), NONE)
        for row, (growth, nodes) in enumerate(zip(rows, wanted, strict=True)):
            for i, node in enumerate(nodes):
                tokens[row, i] = growth.tokens[node]
                parents[row, i] = growth.children[growth.parents[node]].place
        return tokens.to(self.network.device), parents

    def _tree(self, rows: list[_Growth], laws: torch.Tensor) -> DraftTree:
        tree = DraftTree.of_rows([(growth.tokens, growth.parents) for growth in rows])
        if not self.draws:
            return tree
        read = [[growth.children[i].place if i in growth.children else 0 for i in range(tree.nodes)] for growth in rows]
        every = torch.arange(len(rows), device=laws.device)[:, None]
        return DraftTree(tree.tokens, tree.shape, laws[every, torch.tensor(read, device=laws.device)])


@register
@dataclass(frozen=True, kw_only=True)
class DySpec(DraftModelMethod):
    """Grows a tree from a draft model, always at the place that verification is likeliest to reach: deep where the draft model is
    sure, wide where it is not.

    A place is chosen before its token is drawn, so that the law stays the model's. ``slot_value=expected`` weighs a place by the
    chance that its next token is accepted as well (not in the paper). With a ``threshold`` the tree grows level by level, wherever
    the value is above it: a forward of the draft model per level, where best first takes more of them.
    """

    id: ClassVar[str] = "dyspec"
    paper: ClassVar[str] = "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure (2024)"
    verifiers: ClassVar[tuple[str, ...]] = ("rejection", "match", "typical")

    budget: Budget = parameter(Budget(amount=32), "tokens drafted in each forward; the original drafts 64")  # noqa: RUF009
    slot_value: str = parameter("product", "what a place is worth: product or expected", search=("product", "expected"))
    threshold: float = parameter(0.0, "value above which places are filled, level by level, such as 1/budget; 0 for best first",
                                 least=0)  # fmt: skip
    temperature: float = parameter(0.6, "of the draft model where the target's is 0", least=0.01)

    def check(self) -> None:
        self.require(self.slot_value in ("product", "expected"), "slot_value must be product or expected.")

    def drafter(self, setting: Setting) -> Drafter:
        return _Best(self, setting)
