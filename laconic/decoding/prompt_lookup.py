"""Prompt lookup: what followed the newest words before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from laconic.budget import Budget
from laconic.decoding.base import Drafter, DraftMethod, Setting, go_on
from laconic.method import parameter
from laconic.registry import register


class _Lookup(Drafter):
    def __init__(self, method: PromptLookup, setting: Setting) -> None:
        super().__init__(method, setting)
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in setting.text.rows]  # where each n-gram ended last
        self.known = [0] * len(setting.text.rows)

    def begin(self, setting: Setting) -> None:
        self.__init__(self.method, setting)  # what it knows is of the old text alone

    def propose_row(self, row: int, ids: list[int], room: int) -> tuple[list[int], list[int]]:
        self._learn(row, ids)
        for size in range(min(self.method.ngram, len(ids) - 1), 0, -1):
            end = self.places[row].get(tuple(ids[-size:]))
            if end is not None:
                found = go_on(ids, end, min(self.method.nodes, room))
                return [ids[-1], *found], list(range(-1, len(found)))
        return [ids[-1]], [-1]

    def _learn(self, row: int, ids: list[int]) -> None:
        """Notes every n-gram that something follows."""
        for end in range(self.known[row], len(ids)):
            for size in range(1, min(self.method.ngram, end) + 1):
                self.places[row][tuple(ids[end - size : end])] = end
        self.known[row] = len(ids)


@register
@dataclass(frozen=True, kw_only=True)
class PromptLookup(DraftMethod):
    """Drafts a chain: what followed the last ``ngram`` tokens when they last stood in the text, shorter ones if need be.

    A text that repeats itself sooner than the draft is long is taken to go on doing so. No model and no training; it pays where
    answers repeat the prompt or themselves: code, summaries, logs.
    """

    id: ClassVar[str] = "prompt_lookup"
    paper: ClassVar[str] = "Prompt Lookup Decoding (Saxena, 2023)"

    budget: Budget = parameter(Budget(amount=8), "tokens drafted in each forward")  # noqa: RUF009
    ngram: int = parameter(3, "longest run of tokens that is looked up", least=1)

    def drafter(self, setting: Setting) -> Drafter:
        return _Lookup(self, setting)
