"""Prompts of a wanted length in tokens: facts at stated depths of real text, then a question."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from laconic.errors import LaconicError
from laconic.evaluation.haystack import haystack

TRIES = 8


def count_tokens(tokenizer: Any, text: str, *, special: bool = True) -> int:
    """Number of tokens of a text, by default with the special tokens that the tokenizer adds to a prompt."""
    return len(tokenizer(text, add_special_tokens=special)["input_ids"])


def split_words(text: str) -> list[str]:
    """Words with the white space before them; joined they are the text, but for white space at its end."""
    return re.findall(r"\s*\S+", text)


def word_sizes(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Tokens of each word on its own: their sum is close to, not always equal to, the tokens of the whole."""
    if not words:
        return []
    return [len(ids) for ids in tokenizer(list(words), add_special_tokens=False)["input_ids"]]


def place(words: Sequence[str], sizes: Sequence[int], facts: Sequence[tuple[float, str]]) -> str:
    """The text of the words with each fact put at its depth (share 0..1 of the tokens before it).

    A fact stands behind the end of a sentence if one lies within 1 % of the text from its depth, and otherwise between
    two words. Facts of equal depth keep their order.
    """
    before = [0, *accumulate(sizes)]
    ends = [0, *(i for i, word in enumerate(words, 1) if word.endswith((".", "!", "?"))), len(words)]
    ends_before = [before[i] for i in ends]
    at: list[tuple[int, str]] = []
    for depth, fact in facts:
        point = depth * before[-1]
        spot = ends[_nearest(ends_before, point)]
        if abs(before[spot] - point) > 0.01 * before[-1]:
            spot = _nearest(before, point)
        at.append((spot, fact))
    pieces: list[str] = []
    done = 0
    for spot, fact in sorted(at, key=lambda item: item[0]):
        pieces += [*words[done:spot], fact]
        done = spot
    pieces += words[done:]
    if at and min(spot for spot, _ in at) == 0:  # a fact stands first and keeps the space that belongs to its sentence
        return "".join(pieces)
    return "".join(pieces).lstrip()


def _nearest(ascending: Sequence[int], point: float) -> int:
    """Index of the entry nearest to ``point``."""
    right = bisect_left(ascending, point)
    return min((i for i in (right - 1, right) if 0 <= i < len(ascending)), key=lambda i: abs(ascending[i] - point))


def build_prompt(tokenizer: Any, length: int, facts: Sequence[tuple[float, str]], question: str, rng: random.Random) -> str:
    """A prompt of ``length`` tokens, special tokens counted: real text with facts ``(depth, sentence)``, the question.

    The length is met as closely as whole words allow. Raises LaconicError where facts and question need more.
    """
    bare = count_tokens(tokenizer, "".join(fact for _, fact in facts) + question)
    if bare > length:
        raise LaconicError(f"A prompt of {length} tokens has no room for this task: use at least {bare} tokens.")
    words = split_words("\n".join(haystack(tokenizer, length * 5 // 4 + 64, rng)))
    sizes = word_sizes(tokenizer, words)
    best, miss, room = "", length + 1, length - bare
    for _ in range(TRIES):
        first, total = len(words), 0
        while first and total + sizes[first - 1] <= room:
            first -= 1
            total += sizes[first]
        gap, kept, weights = room - total, words[first:], sizes[first:]
        if first and gap > length // 200:  # the next word is a giant, such as a ruler: take its end
            giant = words[first - 1].lstrip()
            kept = [" " + giant[len(giant) - len(giant) * gap // sizes[first - 1] :], *kept]
            weights = [gap, *weights]
        prompt = place(kept, weights, facts) + question
        missing = length - count_tokens(tokenizer, prompt)
        if abs(missing) < miss:
            best, miss = prompt, abs(missing)
        if 0 <= missing <= length // 200:
            break
        # Words on their own and in a text may differ in tokens: aim again by what was missed.
        room = max(0, room + missing)
    return best
