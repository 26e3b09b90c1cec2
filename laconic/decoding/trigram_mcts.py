"""ADED (Adaptix): a table of what follows two tokens, which the text adapts, searched by Monte-Carlo tree search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, DraftMethod, Setting
from laconic.decoding.tree import NONE, trie
from laconic.method import parameter
from laconic.profiles import find_profile, need_file
from laconic.registry import register

CAP = 3.0  # of a score
FEW = 12  # successors of a pair that a corpus brings
KEPT = 20_000  # trigrams that a profile holds, the most frequent


class TrigramTable:
    """Scores of (first, second) -> third, in flat arrays, so that compiled code searches it.

    The successors of a pair are a linked list in the order of their coming. ``limit``: the most trigrams; when there are more,
    the half of the pairs that was not met for longest is forgotten.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.clock = limit, 0
        self._clear(1024)

    def _clear(self, size: int) -> None:
        self.slots = np.full(1 << (4 * size - 1).bit_length(), NONE, np.int32)  # a hash table of pairs, by linear probing
        self.keys = np.zeros((size, 2), np.int64)
        self.first, self.met = np.full(size, NONE, np.int32), np.zeros(size, np.int64)
        self.tokens, self.next = np.zeros(size, np.int64), np.full(size, NONE, np.int32)
        self.scores = np.zeros(size, np.float64)
        self.used = np.zeros(2, np.int64)  # pairs, trigrams

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.slots, self.keys, self.first, self.met, self.tokens, self.next, self.scores, self.used

    def observe(self, ids: Sequence[int], bump: float) -> None:
        """Raises the score of every trigram in ``ids``, once for each time that it occurs, up to ``CAP``."""
        if len(ids) > 2:
            triples = np.lib.stride_tricks.sliding_window_view(np.asarray(ids, np.int64), 3)
            self.add(triples, np.full(len(triples), bump))

    def add(self, triples: np.ndarray, bumps: np.ndarray) -> None:
        """Raises the scores of ``triples`` (n, 3) by ``bumps`` (n,), one after the other."""
        from laconic.kernels import cpu_trigrams

        self.clock += 1
        for begin in range(0, len(triples), 4096):  # so that no more room is made than new ones may need
            some = slice(begin, begin + 4096)
            self._reserve(len(triples[some]))
            cpu_trigrams.add(np.ascontiguousarray(triples[some]), bumps[some], CAP, self.clock, *self.arrays)

    def scores_of(self) -> dict[tuple[int, int, int], float]:
        """All of it, for people."""
        found = {}
        for slot in range(self.used[0]):
            at = self.first[slot]
            while at != NONE:
                found[(*map(int, self.keys[slot]), int(self.tokens[at]))] = float(self.scores[at])
                at = self.next[at]
        return found

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def _reserve(self, more: int) -> None:
        """Room for ``more`` trigrams."""
        pairs, needed = np.arange(self.used[0]), int(self.used[1]) + more
        if needed > self.limit:
            newest = np.argsort(self.met[: len(pairs)], kind="stable")[len(pairs) // 2 :]
            self._rebuild(np.sort(newest), max(len(self.tokens), needed))
        elif needed > len(self.tokens):
            self._rebuild(pairs, 2 * needed)

    def _rebuild(self, kept: np.ndarray, size: int) -> None:
        """The table of the pairs ``kept`` alone, with room for ``size`` trigrams."""
        from laconic.kernels import cpu_trigrams

        old = self.arrays
        self._clear(size)
        cpu_trigrams.copy(kept, *old, *self.arrays)


class _Searcher(Drafter):
    def __init__(self, method: TrigramMcts, setting: Setting) -> None:
        super().__init__(method, setting)
        self.table = TrigramTable(method.limit)
        self.random = np.array([setting.generator.initial_seed() % (1 << 63) | 1], np.uint64)
        if method.profile:
            tables = find_profile(method.id, method.profile, setting.model)
            self.table.add(np.array(tables["trigrams"], np.int64).reshape(-1, 3), np.array(tables["shares"], np.float64))
        if method.observe_prompt:
            for ids in setting.text.rows:
                self.table.observe(ids, method.bump)

    def propose_row(self, row: int, ids: list[int], room: int) -> tuple[list[int], list[int]]:
        from laconic.kernels import cpu_trigrams

        method = self.method
        self.table.observe(ids[-method.window :], method.bump)
        if len(ids) < 2:
            return [ids[-1]], [NONE]
        found = cpu_trigrams.search(
            ids[-2], ids[-1], method.iterations, method.paths, method.reward == "sum", method.explore, method.base, self.random,
            *self.table.arrays,
        )  # fmt: skip
        return trie(ids[-1], [[t for t in path if t >= 0][:room] for path in found.tolist()], method.nodes)

    @property
    def bytes(self) -> int:
        return self.table.bytes


@register
@dataclass(frozen=True, kw_only=True)
class TrigramMcts(DraftMethod):
    """Drafts a tree from a table of trigrams that adapts to the newest text, by a small Monte-Carlo tree search. Known as ADED.

    The search finds the most visited paths of three tokens, each goes on with its best successor, and the most visited come
    first. No model; a table learned from a corpus (``laconic profile trigram_mcts --model MODEL --text FILE --samples 200``)
    is a good start. The rows of a batch share the table, which lives on in ``Decoded.drafter``. The original cuts its tree by
    taking away whole long paths; here the budget ends it.
    """

    id: ClassVar[str] = "trigram_mcts"
    paper: ClassVar[str] = "Adaptive Draft-Verification for Efficient Large Language Model Decoding (2024)"

    budget: Budget = parameter(Budget(amount=24), "tokens drafted in each forward; the original drafts 64")  # noqa: RUF009
    iterations: int = parameter(150, "rounds of the search", least=1)
    paths: int = parameter(24, "most visited nodes of the search that are drafted, the root being one", least=2)
    window: int = parameter(16, "newest tokens whose trigrams are raised before every draft", least=3)
    bump: float = parameter(0.04, "what a trigram's score grows by each time that it is met, to 3 at most", least=0.0)
    reward: str = parameter("sum", "of a path: the sum of its scores, or constant", search=("sum", "constant"))
    explore: float = parameter(32.0, "weight of what was visited little (c1)", least=0.0)
    base: float = parameter(8.0, "visits after which exploring grows (c2)", least=1.0, search=())
    observe_prompt: bool = parameter(False, "meet the whole prompt once before the first draft")
    limit: int = parameter(200_000, "trigrams remembered; then those not met for longest go", least=10_000, search=())
    profile: str = parameter("", "a file of laconic profile trigram_mcts; empty: start with an empty table", search=())

    def check(self) -> None:
        self.require(self.reward in ("sum", "constant"), "reward must be sum or constant.")
        need_file(self.id, self.profile)

    @classmethod
    def calibrate(cls, model: torch.nn.Module, texts: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The most frequent trigrams of ``texts`` and their shares of all that follow the same two tokens."""
        counts, pairs = Counter(), Counter()
        for ids in (text.tolist() for text in texts):
            triples = list(zip(ids, ids[1:], ids[2:], strict=False))
            counts.update(triples)
            pairs.update(triple[:2] for triple in triples)
        taken, kept = Counter(), []
        for triple, _ in counts.most_common():
            if len(kept) < KEPT and taken[triple[:2]] < FEW:
                taken[triple[:2]] += 1
                kept.append(triple)
        return {"trigrams": kept, "shares": [round(counts[t] / pairs[t[:2]], 6) for t in kept]}

    def drafter(self, setting: Setting) -> Drafter:
        return _Searcher(self, setting)
