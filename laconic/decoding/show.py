"""Drafts for the eye: the text with its accepted tokens in green, and the tree of the running forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from laconic.decoding.engine import Progress

ACCEPTED, OWN, REJECTED = "bold green", "bold", "dim red"
TAIL = 120  # tokens of the text that stay in view while it is written
STEPS = 8  # pictures a second


class TreeView:
    """Told of every step of one text. In a terminal the newest tree moves; in a pipe every forward is a line."""

    def __init__(self, console: Console, tokenizer: Any) -> None:
        self.console, self.tokenizer = console, tokenizer
        self.text: list[tuple[str, str]] = []  # tokens with their style
        self._live: Live | None = None

    @contextmanager
    def watching(self) -> Iterator[TreeView]:
        """Around the run; at its end the whole text is left in the terminal."""
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=STEPS, transient=True, vertical_overflow="crop") as self._live:
                yield self
            self.console.print(self._colour(self.text))
        else:
            yield self

    def __call__(self, step: Progress) -> None:
        tokens, parents, accepted, new = step.tokens[0], step.parents[0], set(step.accepted[0]), step.new[0]
        words = [(self._word(token), ACCEPTED if i < len(accepted) else OWN) for i, token in enumerate(new)]
        self.text += words
        if self._live is not None:
            self._live.update(Group(self._colour(self.text[-TAIL:]), self._tree(tokens, parents, accepted)))
        elif new:
            drafted = f"{len(accepted)} of {len(tokens) - 1} accepted"
            self.console.print(Text.assemble((f"{drafted:>20}  ", "dim"), *((_visible(word), style) for word, style in words)))

    def _tree(self, tokens: list[int], parents: list[int], accepted: set[int]) -> Tree:
        root = Tree(Text(_visible(self._word(tokens[0])), OWN))
        places = [root]
        for node in range(1, len(tokens)):
            style = ACCEPTED if node in accepted else REJECTED
            places.append(places[parents[node]].add(Text(_visible(self._word(tokens[node])), style)))
        return root

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])

    @staticmethod
    def _colour(words: list[tuple[str, str]]) -> Text:
        return Text.assemble(*words)


def _visible(word: str) -> str:
    """A token on one line, with its spaces and line ends to be seen."""
    return word.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
