"""CyclicReflex: words of reflection, encouraged and discouraged in turns while a model thinks; two plainer ways beside it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.decoding.base import SampleMethod, Setting
from laconic.decoding.sampling import Processor, Text
from laconic.decoding.tree import DraftTree
from laconic.errors import LaconicError, quote
from laconic.method import parameter
from laconic.registry import register

WORDS = "wait Wait but But Alternatively"


def wave(t: torch.Tensor, amplitude: float, period: int, shift: float = 0.0) -> torch.Tensor:
    """0, up to ``amplitude`` at a quarter of the period, down to its negative at three quarters, and back: a triangle of mean 0.

    Args:
        t: tokens written so far, any shape. shift: in periods; 0.5 turns the wave over.
    """
    phase = ((t.double() + shift * period) % period) / period
    falling = torch.where(phase <= 0.75, 2 - 4 * phase, 4 * phase - 4)
    return amplitude * torch.where(phase <= 0.25, 4 * phase, falling)


def single_tokens(words: Sequence[str], tokenizer: Any, variants: bool = False) -> list[int]:
    """Ids of the tokens that write exactly one of ``words``; with ``variants`` also those with a space in front or other case.

    The vocabulary is searched: words that take several tokens have none, and raise an error where that is true of all.
    """
    from laconic.decoding.constraints import token_bytes

    wanted = {word.lower() if variants else word for word in words}
    found = []
    for token, piece in enumerate(token_bytes(tokenizer)):
        text = (piece or b"").decode(errors="ignore")
        if (text.removeprefix(" ").lower() if variants else text) in wanted:
            found.append(token)
    if not found:
        hint = "give other words" if variants else "write variants=true, which takes them with a space in front"
        raise LaconicError(f"None of the words {quote(' '.join(words))} is one token of this tokenizer: {hint}.")
    return found


class Thinking:
    """Where each node of a tree stands: tokens written, and whether thinking goes on.

    The end of thinking is looked for in new tokens only; what was found is kept per text.
    """

    def __init__(self, end: int | None) -> None:
        self.end = end
        self._seen: weakref.WeakKeyDictionary[Text, list[tuple[int, bool]]] = weakref.WeakKeyDictionary()

    def __call__(self, text: Text, tree: DraftTree) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 and boolean ``(batch, nodes)``: new tokens up to each node, and whether none of them ends the thinking."""
        shape = tree.shape
        written = torch.tensor([text.written(row) for row in range(len(text.rows))], device=tree.tokens.device)
        t = written[:, None] + shape.depths.clamp(min=0).to(written.device)
        if self.end is None:
            return t, torch.ones_like(t, dtype=torch.bool)
        rows = self._seen.setdefault(text, [(count, False) for count in text.prompts])
        for row, (count, over) in enumerate(rows):
            ids = text.rows[row]
            rows[row] = len(ids), over or self.end in ids[count:]
        closes = tree.tokens == self.end
        closes[:, 0] = False  # the root is part of the text
        over = (shape.ancestors & closes[:, None, :]).any(-1)
        return t, ~over & ~torch.tensor([over for _, over in rows], device=t.device)[:, None]


@dataclass(frozen=True, kw_only=True)
class Reflection(SampleMethod):
    """Base of methods that steer words of reflection while a reasoning model thinks. ``decode`` needs the ``tokenizer``.

    ``t`` counts the tokens written before the one that comes next, along the way to each node of a draft tree, so that any
    drafter leaves the text as it is.
    """

    words: str = parameter(WORDS, "words of reflection, each one token, with spaces between", search=())
    variants: bool = parameter(False, "take the words with a space in front and in other case too", search=())
    end: str = parameter("</think>", "token that ends the thinking; empty for none", search=())
    offset: int = parameter(0, "tokens of thinking that the prompt has already", least=0, search=())

    def check(self) -> None:
        self.require(bool(self.words.split()), "words is empty: give one or more words.")

    def processors(self, setting: Setting) -> tuple[Processor, ...]:
        if setting.tokenizer is None:
            raise LaconicError(f"{self.id} looks for words: give decode the tokenizer.")
        ids = single_tokens(self.words.split(), setting.tokenizer, self.variants)
        return (self.processor(ids, self._end(setting.tokenizer)),)

    def _end(self, tokenizer: Any) -> int | None:
        if not self.end:
            return None
        vocabulary = tokenizer.get_vocab()
        if self.end not in vocabulary:
            raise LaconicError(f"{self.id}: the tokenizer has no token {quote(self.end)}: name the one that ends the thinking.")
        return vocabulary[self.end]

    def processor(self, ids: Sequence[int], end: int | None) -> Processor:
        """Adds ``delta`` to the logits of ``ids`` while the model thinks; ``end`` is the token that ends the thinking."""
        thinking = Thinking(end)

        def process(logits: torch.Tensor, text: Text, tree: DraftTree) -> torch.Tensor:
            t, on = thinking(text, tree)
            added = (self.delta(t + self.offset) * on).to(logits)
            index = torch.tensor(list(ids), device=logits.device)
            return logits.index_add(-1, index, added[..., None].expand(*added.shape, len(index)))

        return process

    def delta(self, t: torch.Tensor) -> torch.Tensor:
        """What is added to the logits of words of reflection after ``t`` tokens, of the same shape."""
        raise NotImplementedError


@register
@dataclass(frozen=True, kw_only=True)
class CyclicReflex(Reflection):
    """Adds a triangular wave to the logits of words of reflection ("wait", "but") while a model thinks.

    It starts at 0, encourages them first and discourages them in the second half of each period. No further computation; it
    composes with any drafter. Made for reasoning models; a period is 300 to 2000 tokens, by how long the thinking is.
    """

    id: ClassVar[str] = "cyclic_reflex"
    paper: ClassVar[str] = "CyclicReflex: Improving Large Reasoning Models via Cyclical Reflection Token Scheduling (2025)"

    amplitude: float = parameter(5.0, "height of the wave, added to logits", least=0.0)
    period: int = parameter(1200, "tokens of one wave", least=1)
    shift: float = parameter(0.0, "where the wave begins, in periods; 0.5 turns it over")
    until: int = parameter(8192, "tokens of thinking after which nothing is added", least=0)

    def delta(self, t: torch.Tensor) -> torch.Tensor:
        return wave(t, self.amplitude, self.period, self.shift) * (t < self.until)


@register
@dataclass(frozen=True, kw_only=True)
class ThoughtPenalty(Reflection):
    """Adds a constant, by default a penalty, to the logits of words of reflection in the first tokens of the thinking."""

    id: ClassVar[str] = "thought_penalty"
    paper: ClassVar[str] = "Thoughts Are All Over the Place: On the Underthinking of o1-Like LLMs (2025)"

    amount: float = parameter(-3.0, "added to logits")
    until: int = parameter(600, "tokens of thinking after which nothing is added", least=0)

    def delta(self, t: torch.Tensor) -> torch.Tensor:
        return self.amount * (t < self.until).double()


@register
@dataclass(frozen=True, kw_only=True)
class BudgetForcing(Reflection):
    """Forbids the end of thinking before ``least`` tokens; where it would be the likeliest token, ``words`` takes its place.

    So a reasoning model thinks at least so long. No further computation; it composes with any drafter.
    """

    id: ClassVar[str] = "budget_forcing"
    paper: ClassVar[str] = "s1: Simple test-time scaling (2025)"

    words: str = parameter("Wait", "word that takes the place of the end of thinking", search=())
    least: int = parameter(600, "tokens of thinking before which it may not end", least=0)

    def check(self) -> None:
        super().check()
        self.require(bool(self.end), "it needs the token that ends the thinking: give end=TOKEN.")

    def processor(self, ids: Sequence[int], end: int | None) -> Processor:
        thinking = Thinking(end)

        def process(logits: torch.Tensor, text: Text, tree: DraftTree) -> torch.Tensor:
            t, on = thinking(text, tree)
            early = (on & (t + self.offset < self.least)).to(logits.device)
            gives_up = early & (logits.argmax(-1) == end)
            forced = torch.full_like(logits, float("-inf"))
            forced[..., ids[0]] = 0.0
            barred = logits.clone()
            barred[..., end] = torch.where(early, float("-inf"), logits[..., end])
            return torch.where(gives_up[..., None], forced, barred)

        return process
