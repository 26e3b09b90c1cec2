"""DySpec: a draft tree that grows where the draft model is sure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, Setting
from laconic.decoding.draft_model import DraftModelMethod, ModelDrafter
from laconic.decoding.tree import NONE, DraftTree
from laconic.decoding.verify import draw_distinct
from laconic.method import parameter
from laconic.registry import register


@dataclass
class Children:
    """What the draft model says after a node: its candidates in the order of drawing, and what is left behind those drawn.

    Attributes:
        place: the node's number in the order of reading.
        sure: sum of all squared probabilities.
        mass: probability of the tokens that are not drawn yet; squares: sum of their squared probabilities.
    """

    place: int
    tokens: list[int]
    chances: list[float]
    sure: float
    mass: float
    squares: float


@dataclass
class Growth:
    """The tree of one row. A slot is the next child of a node; its value is how likely verification gets there.

    ``ready``: slots of nodes that the draft model has read; ``unread``: first slots of the other nodes, worth what is known of
    them. Entries are (-worth, order of coming, node).
    """

    method: DySpec
    room: int
    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [NONE])
    values: list[float] = field(default_factory=lambda: [1.0])
    depths: list[int] = field(default_factory=lambda: [0])
    children: dict[int, Children] = field(default_factory=dict)
    ready: list[tuple[float, int, int]] = field(default_factory=list)
    unread: list[tuple[float, int, int]] = field(default_factory=list)
    came: int = 0

    @property
    def left(self) -> int:
        return self.method.nodes + 1 - len(self.tokens)

    def read(self, node: int, children: Children) -> None:
        """Tells what may follow a node."""
        self.children[node] = children
        self._open(node)

    def grow(self) -> list[int]:
        """Draws children until the tree is full or hangs on nodes that have to be read: these."""
        level = self.method.threshold > 0
        while self.left and self.ready and (level or not self.unread or self.ready[0] < self.unread[0]):
            self._draw(heapq.heappop(self.ready)[2])
        if not self.left:
            return []
        best = self.unread if level else heapq.nsmallest(self.left, self.ready + self.unread)  # others come too late
        wanted = {entry[2] for entry in best} - self.children.keys()
        self.unread = [entry for entry in self.unread if entry[2] not in wanted]
        heapq.heapify(self.unread)
        return sorted(wanted)

    def _draw(self, node: int) -> None:
        here = self.children[node]
        chance, child = here.chances.pop(0), len(self.tokens)
        self.tokens.append(here.tokens.pop(0))
        self.parents.append(node)
        self.values.append(self.values[node] * chance)
        self.depths.append(self.depths[node] + 1)
        here.mass, here.squares = here.mass - chance, here.squares - chance * chance
        self._open(node)
        if self.depths[child] < self.room:
            self._push(self.unread, child, self.values[child], here.sure)  # it is taken to be as sure as its parent was

    def _open(self, node: int) -> None:
        """The slot of the next child, if there is any probability left for one."""
        here = self.children[node]
        if here.chances and here.chances[0] > 0:
            mass = max(here.mass, 1e-12)
            self._push(self.ready, node, self.values[node] * mass, here.squares / mass**2)

    def _push(self, heap: list[tuple[float, int, int]], node: int, value: float, hope: float) -> None:
        """Args: hope: how likely the next child is accepted once verification gets there, sum of R^2."""
        if value > self.method.threshold:
            self.came += 1
            heapq.heappush(heap, (-value * (hope if self.method.slot_value == "expected" else 1.0), self.came, node))


class BestFirst(ModelDrafter):
    method: DySpec

    def draft(self, scores: torch.Tensor, room: int) -> DraftTree:
        text = self.text
        rows = [Growth(self.method, room, ids[-1:]) for ids in text.rows]
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

    def _tell(self, rows: list[Growth], wanted: list[list[int]], law: torch.Tensor, place: int) -> None:
        """Hands each row what follows the nodes that it wanted to be read, from ``place`` on."""
        count = min(self.method.nodes, law.shape[-1])
        tokens = draw_distinct(law, count, self.setting.generator) if self.draws else law.topk(count, dim=-1).indices
        chances, squares = law.gather(-1, tokens).tolist(), law.square().sum(-1).tolist()
        tokens = tokens.tolist()
        for row, nodes in enumerate(wanted):
            for i, node in enumerate(nodes):
                sure = squares[row][i]
                rows[row].read(node, Children(place + i, tokens[row][i], chances[row][i], sure, 1.0, sure))

    def _level(self, rows: list[Growth], wanted: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and parents of the nodes to be read, in the order of reading; empty nodes behind where a row wants fewer."""
        width = max(map(len, wanted))
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        parents = torch.full((len(rows), width), NONE)
        for row, (growth, nodes) in enumerate(zip(rows, wanted, strict=True)):
            for i, node in enumerate(nodes):
                tokens[row, i] = growth.tokens[node]
                parents[row, i] = growth.children[growth.parents[node]].place
        return tokens.to(self.network.device), parents

    def _tree(self, rows: list[Growth], laws: torch.Tensor) -> DraftTree:
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
    chance that its next token is accepted as well (not in the paper). With a ``threshold`` the tree grows level by level, where
    its value is above that: a forward of the draft model per level, where best first takes more of them.

    A draft model that is right more often than it is sure, as in sampling at temperature 1, makes the tree wide and shallow: then
    a chain or a fixed tree (``speculative``) is better.
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
        return BestFirst(self, setting)
