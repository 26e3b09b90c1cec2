"""Questions with one exact answer, made by a seeded generator: what the built-in diffusion models learn and are measured on.

Nine kinds, with answers of one to some sixty tokens. A tenth of all questions, chosen by a hash of their text, is held out: no
seed ever trains on them. An answer begins with a space, so that question and answer are tokenized apart as they are together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from laconic.errors import LaconicError

WORDS = (
    "air", "arm", "bag", "bank", "bed", "bell", "bird", "boat", "body", "book", "box", "boy", "bread", "bridge", "bus", "cake",
    "car", "cat", "chair", "child", "city", "coat", "cow", "cup", "day", "desk", "dog", "door", "ear", "egg", "eye", "face",
    "farm", "field", "fire", "fish", "flag", "floor", "foot", "fox", "game", "gate", "girl", "glass", "gold", "hair", "hall",
    "hand", "hat", "head", "hill", "home", "horse", "house", "ice", "ink", "iron", "key", "king", "lake", "lamp", "land",
    "leaf", "leg", "letter", "light", "line", "lion", "lip", "map", "milk", "moon", "mouth", "neck", "night", "nose", "oil",
    "page", "park", "pen", "pig", "plant", "queen", "rain", "ring", "river", "road", "rock", "roof", "room", "rose", "salt",
    "sand", "sea", "seed", "ship", "shoe", "shop", "sky", "snow", "song", "star", "stone", "street", "sun", "table", "tail",
    "time", "tooth", "town", "toy", "train", "tree", "wall", "watch", "water", "wind", "window", "wood",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT = 10  # one question in so many
TRIES = 1000  # questions in a row that may be too long for a document

Draw = np.random.Generator


@dataclass(frozen=True)
class Question:
    """``prompt`` ends where the answer begins, and ``answer`` starts with a space."""

    kind: str
    prompt: str
    answer: str


def _words(rng: Draw, least: int, most: int) -> list[str]:
    return [str(word) for word in rng.choice(WORDS, int(rng.integers(least, most + 1)), replace=False)]


def _copy(rng: Draw) -> tuple[str, str]:
    words = " ".join(_words(rng, 3, 40))
    return words, words


def _reverse(rng: Draw) -> tuple[str, str]:
    words = _words(rng, 3, 20)
    return " ".join(words), " ".join(reversed(words))


def _sort(rng: Draw) -> tuple[str, str]:
    letters = rng.choice(list(LETTERS), int(rng.integers(3, 11)), replace=False)
    return " ".join(letters), " ".join(sorted(letters))


def _sum(rng: Draw) -> tuple[str, str]:
    first, second = (int(n) for n in rng.integers(0, 50, 2))
    return f"{first} + {second}", str(first + second)


def _lookup(rng: Draw) -> tuple[str, str]:
    """The value, of one to three words, of one of several keys."""
    keys = _words(rng, 2, 6)
    pairs = [(key, " ".join(_words(rng, 1, 3))) for key in keys]
    key, value = pairs[int(rng.integers(len(pairs)))]
    return ", ".join(f"{k} is {v}" for k, v in pairs) + f"; {key}", value


def _spell(rng: Draw) -> tuple[str, str]:
    words = _words(rng, 2, 6)
    return " ".join(words), " , ".join(" ".join(word) for word in words)


def _count(rng: Draw) -> tuple[str, str]:
    start, numbers = int(rng.integers(0, 70)), int(rng.integers(3, 26))
    return f"{start} to {start + numbers - 1}", " ".join(str(start + i) for i in range(numbers))


def _many(rng: Draw) -> tuple[str, str]:
    """How often a letter stands in a row of few different ones."""
    letters = [str(a) for a in rng.choice(rng.choice(list(LETTERS), 3, replace=False), int(rng.integers(3, 13)))]
    asked = letters[int(rng.integers(len(letters)))]
    return " ".join(letters) + f"; {asked}", str(letters.count(asked))


def _repeat(rng: Draw) -> tuple[str, str]:
    words, times = " ".join(_words(rng, 1, 4)), int(rng.integers(2, 13))
    return f"{words}; {times} times", " ".join([words] * times)


KINDS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "copy": _copy, "reverse": _reverse, "sort": _sort, "sum": _sum, "lookup": _lookup, "spell": _spell, "count": _count,
    "many": _many, "repeat": _repeat,
}  # fmt: skip


def is_held_out(prompt: str) -> bool:
    """Whether a question may only be asked, never learned."""
    return zlib.crc32(prompt.encode()) % HELD_OUT == 0


def questions(seed: int, *, held_out: bool = False, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[Question]:
    """Endless questions, ``kinds`` in turn; always the same ones for a seed. Held out: those that no model was trained on."""
    rng = np.random.default_rng(seed)
    while True:
        for kind in kinds:
            while True:
                asked, answer = KINDS[kind](rng)
                prompt = f"{kind}: {asked} ="
                if is_held_out(prompt) == held_out:
                    break
            yield Question(kind, prompt, f" {answer}")


class Documents:
    """Rows of questions, answers and padding, for training: arrays ``(rows, length)``.

    A document is ``<bos>question answer<eos>...<eos>``: the number of end tokens is random, and what follows is the next
    document, which must not be seen: other answers are made of the same words. One row in four ends after its first document,
    in padding up to the end, as an answer does in a long canvas.
    """

    PADDING, ALONE = 5, 0.25  # mean number of end tokens after an answer; share of rows with a single document

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(seed)
        self.source = questions(seed + 1)
        self.waiting: list[tuple[list[int], list[int]]] = []

    def take(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, int64; which of them belong to an answer or its padding, bool; where in the row each one's document begins."""
        ids = np.full((rows, length), self.tokenizer.eos_token_id, dtype=np.int64)
        answers, begins = np.ones((rows, length), dtype=bool), np.zeros((rows, length), dtype=np.int64)
        for row in range(rows):
            alone, at = self.rng.random() < self.ALONE, 0
            while at == 0 or (not alone and at < length - length // 8):
                behind = self._put(ids[row], answers[row], at)
                if not answers[row, at:].all():  # something was put there
                    begins[row, at:] = at
                at = behind
        return ids, answers, begins

    def _put(self, ids: np.ndarray, answers: np.ndarray, at: int) -> int:
        """Writes the next document at ``at`` if it fits; gives the position behind it, or the end of the row."""
        prompt, answer = self._next(len(ids))
        end = at + len(prompt) + len(answer) + 1
        if end > len(ids):
            return len(ids)
        ids[at:end] = [*prompt, *answer, self.tokenizer.eos_token_id]
        answers[at : at + len(prompt)] = False
        return end + int(self.rng.geometric(1 / self.PADDING)) - 1

    def _next(self, longest: int) -> tuple[list[int], list[int]]:
        """Token ids of the next question and answer that together fit into a row."""
        for _ in range(TRIES):
            if not self.waiting:
                asked = list(islice(self.source, 256))
                prompts = self.tokenizer([q.prompt for q in asked])["input_ids"]
                found = self.tokenizer([q.answer for q in asked], add_special_tokens=False)["input_ids"]
                self.waiting = list(zip(prompts, found, strict=True))
            prompt, answer = self.waiting.pop()
            if len(prompt) + len(answer) < longest:
                return prompt, answer
        raise LaconicError(f"Hardly a question fits into a row of {longest} tokens: make rows longer.")
