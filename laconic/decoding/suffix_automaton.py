"""Suffix automaton: the longest part of the text that ends here and stood there before, and what came next."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

from laconic.budget import Budget
from laconic.decoding.base import Drafter, DraftMethod, Setting, go_on
from laconic.decoding.tree import NONE
from laconic.method import parameter
from laconic.registry import register

CLIMB = 16  # shorter suffixes that are told of an occurrence: a text such as aaaa has as many suffixes as tokens


class Automaton:
    """All parts of a text, in as many states as it has tokens, twice at most; a token is added in amortised constant time.

    A state stands for the parts that end at the same places (Blumer et al., 1985).

    Attributes:
        onward: of each state, where the next token leads. link: the state of the longest suffix that ends at more places.
        length: tokens of the longest part. ends: where it ended last, before the newest token where it has just ended again.
        counts: how often it ended. Both are kept up to date for the ``CLIMB`` longest suffixes of the text.
    """

    def __init__(self) -> None:
        self.onward: list[dict[int, int]] = [{}]
        self.link, self.length, self.ends, self.counts = [NONE], [0], [0], [0]
        self.last, self.tokens = 0, 0

    def add(self, token: int) -> None:
        """Appends a token to the text."""
        self._note()
        self.tokens += 1
        new, at = self._state({}, self.length[self.last] + 1, self.tokens, 1), self.last
        while at != NONE and token not in self.onward[at]:
            self.onward[at][token] = new
            at = self.link[at]
        self.link[new] = 0 if at == NONE else self._split(at, token)
        self.last = new

    def _state(self, onward: dict[int, int], length: int, end: int, count: int) -> int:
        for column, value in zip(
            (self.onward, self.link, self.length, self.ends, self.counts), (onward, 0, length, end, count), strict=True
        ):
            column.append(value)
        return len(self.onward) - 1

    def _split(self, at: int, token: int) -> int:
        """The state of the longest part at ``at`` followed by ``token``, which is made if longer ones share it."""
        state = self.onward[at][token]
        if self.length[state] == self.length[at] + 1:
            return state
        clone = self._state(dict(self.onward[state]), self.length[at] + 1, self.ends[state], self.counts[state])
        self.link[clone], self.link[state] = self.link[state], clone
        while at != NONE and self.onward[at].get(token) == state:
            self.onward[at][token] = clone
            at = self.link[at]
        return clone

    def _note(self) -> None:
        """The suffixes of the text have ended here: noted when a token follows, so that ``ends`` is an earlier place before."""
        at = self.link[self.last]
        for _ in range(CLIMB):
            if at <= 0:
                break
            self.ends[at] = self.tokens
            self.counts[at] += 1
            at = self.link[at]

    @property
    def match(self) -> int:
        """The state of the longest suffix of the text that ended before as well; 0 for none."""
        return max(self.link[self.last], 0)


class _Finder(Drafter):
    def __init__(self, method: SuffixAutomaton, setting: Setting) -> None:
        super().__init__(method, setting)
        self.automata = [Automaton() for _ in setting.text.rows]

    def begin(self, setting: Setting) -> None:
        self.__init__(self.method, setting)  # what it knows is of the old text alone

    def propose_row(self, row: int, ids: list[int], room: int) -> tuple[list[int], list[int]]:
        automaton = self.automata[row]
        for token in ids[automaton.tokens :]:
            automaton.add(token)
        state = automaton.match
        if automaton.length[state] < self.method.least:
            return [ids[-1]], [NONE]
        if self.method.follow == "often":
            return self._often(automaton, state, ids[-1], room)
        found = go_on(ids, automaton.ends[state], min(self.method.nodes, room))
        return [ids[-1], *found], list(range(NONE, len(found)))

    def _often(self, automaton: Automaton, state: int, root: int, room: int) -> tuple[list[int], list[int]]:
        """The continuations that are most frequent, as a tree: the nodes with the largest products of shares."""
        tokens, parents, depths = [root], [NONE], [0]
        heap = _shares(automaton, state, 0, -1.0)
        while heap and len(tokens) <= self.method.nodes:
            worth, _, token, parent, state = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            if depths[-1] < room:
                for child in _shares(automaton, state, len(tokens) - 1, worth):
                    heapq.heappush(heap, child)
        return tokens, parents

    @property
    def bytes(self) -> int:
        """Counted as numbers of 8 bytes: four of each state, two of each transition."""
        return sum(8 * (4 * len(a.onward) + 2 * sum(map(len, a.onward))) for a in self.automata)


def _shares(automaton: Automaton, state: int, parent: int, worth: float) -> list[tuple[float, int, int, int, int]]:
    """What follows a state, as entries of a heap: worth below 0, recency, token, parent node and state."""
    onward = automaton.onward[state]
    total = sum(automaton.counts[next_] for next_ in onward.values())
    found = [
        (worth * automaton.counts[next_] / total, -automaton.ends[next_], token, parent, next_) for token, next_ in onward.items()
    ]
    heapq.heapify(found)
    return found


@register
@dataclass(frozen=True, kw_only=True)
class SuffixAutomaton(DraftMethod):
    """Drafts what followed the longest suffix of the text that stood in it before, of whatever length.

    No model and no training; as ``prompt_lookup``, without a longest n-gram, and with a token learned in constant time. An
    automaton per row knows the prompt and the output. ``last`` drafts a chain, what came after the latest occurrence; ``often`` a
    tree of what came most often.
    """

    id: ClassVar[str] = "suffix_automaton"
    paper: ClassVar[str] = "SAM Decoding: Speculative Decoding via Suffix Automaton (2024)"

    budget: Budget = parameter(Budget(amount=8), "tokens drafted in each forward")  # noqa: RUF009
    follow: str = parameter("last", "what to draft: after the last occurrence, or what follows often", search=("last", "often"))
    least: int = parameter(1, "shortest suffix that is believed, in tokens", least=1)

    def check(self) -> None:
        self.require(self.follow in ("last", "often"), "follow must be last or often.")

    def drafter(self, setting: Setting) -> Drafter:
        return _Finder(self, setting)
