"""Training documents for the built-in `needle` model: facts in real text, then many questions about them.

A document holds needles, chains of links and key-value lists, in the very words of `laconic.evaluation.tasks`. The
answers of all questions and a share of the text positions are supervised. Everything works on token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from laconic.evaluation import wording
from laconic.models.names import code_names

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Token ids and positions, (batch, length) int64; the labels are those of the same position (not shifted)."""

    ids: np.ndarray
    positions: np.ndarray
    answers: np.ndarray
    text: np.ndarray


class DocumentMaker:
    """Makes random documents of an exact token length. `corpus`: one array of token ids of running text."""

    def __init__(self, tokenizer, corpus: np.ndarray, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.corpus = corpus
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.names = np.array([self.encode(" " + name) for name in code_names()])[:, 0]
        stops = [self.encode(".")[0], self.encode("\n")[0]]
        self.breaks = np.flatnonzero(np.isin(corpus, stops)) + 1
        self.breaks = self.breaks[self.breaks < len(corpus) - 20000]
        self._templates: dict[str, list[list[int]]] = {}

    def fill(self, template: str, **names: list[int]) -> list[int]:
        """The token ids of a template in which each {field} is replaced by name tokens."""
        if template not in self._templates:
            pieces = template.replace("}", "{").split("{")
            self._templates[template] = [self.encode(p) if i % 2 == 0 else p for i, p in enumerate(pieces)]
        ids: list[int] = []
        for piece in self._templates[template]:
            ids.extend(names[piece] if isinstance(piece, str) else piece)
        return ids

    # Each item: (list of fact token lists in order, list of (question ids, answer ids)).
    def needle(self, take):
        key, value = take(1), take(2)
        fact = self.fill(wording.NEEDLE, key=key, value=value)
        question = wording.NEEDLE_QUESTION if self.rng.random() < self.full else wording.NEEDLE_PREFIX
        return [fact], [(self.fill(question, key=key), value + self.fill("."))]

    def thread(self, take):
        hops = int(self.rng.integers(1, 5)) if self.full else 1
        path = take(hops + 1)
        facts = [self.fill(wording.LINK, key=[a], value=[b]) for a, b in pairwise(path)]
        order = self.rng.integers(3)
        if order == 1:
            facts.reverse()
        elif order == 2:
            self.rng.shuffle(facts)
        question = wording.LINK_QUESTION if self.rng.random() < self.full else wording.LINK_PREFIX
        return facts, [(self.fill(question, key=path[:1]), path[1:] + self.fill("."))]

    def pairs(self, take):
        count = int(self.rng.integers(2, 9))
        entries, questions = [], []
        for _ in range(count):
            key, value = take(1), take(2)
            entries += self.fill(wording.PAIR, key=key, value=value)
            question = wording.PAIR_QUESTION if self.rng.random() < self.full else wording.PAIR_PREFIX
            questions.append((self.fill(question, key=key), value))
        block = self.fill(wording.PAIRS_OPEN) + entries[:-1] + self.fill(wording.PAIRS_CLOSE)
        return [block], questions

    def recall(self, length: int) -> tuple[list[int], list[int], list[int]]:
        """Bare pairs of names, then as many questions as fit: `a b c d ... c d a b`.

        Looking up a name is learned from these: with many pairs in few tokens, copying any name does not pay.
        """
        count = min(max(3, length // 6), 200)
        names = self.rng.permutation(self.names)[: 2 * count].reshape(count, 2)
        ids = names.flatten().tolist()
        asked = [names[i].tolist() for i in self.rng.integers(0, count, (length - len(ids) + 1) // 2)]
        labels = [IGNORED] * len(ids) + [label for _, value in asked for label in (IGNORED, value)]
        ids += [name for pair in asked for name in pair]
        return ids[:length], labels[:length], [IGNORED] * length

    def document(self, length: int) -> tuple[list[int], list[int], list[int]]:
        """Ids, answer labels and text labels of one document of exactly `length` tokens."""
        rng = self.rng
        share = 0.5 if length <= 64 else 0.2 if length <= 256 else 0.05
        if length < 64 or rng.random() < share:  # sentences and their questions need 64 tokens
            return self.recall(length)
        self.full = 0.0 if length < 128 else 0.6
        pool = list(rng.permutation(self.names))
        take = lambda n: [int(pool.pop()) for _ in range(n)]  # noqa: E731
        questions_wanted = int(np.clip(length // 40, 3, 40))
        fact_tokens = length // 2 if length < 128 or rng.random() < 0.4 else int(rng.uniform(0.05, 0.4) * length)
        groups, questions, size = [], [], 0
        while size < fact_tokens and len(pool) > 60:
            kind = rng.random()
            make = self.needle if kind < 0.45 else self.thread if kind < 0.9 or length < 256 else self.pairs
            facts, asked = make(take)
            groups.append(facts)
            questions += asked
            size += sum(map(len, facts))
        rng.shuffle(questions)
        tail, labels = self._questions(questions[:questions_wanted], min(length - size - 4, length * 3 // 5))
        facts = self._interleave(groups)
        text_tokens = length - len(tail) - sum(map(len, facts))
        ids, text_labels = self._haystack(facts, text_tokens)
        return ids + tail, [IGNORED] * len(ids) + labels, text_labels + [IGNORED] * len(tail)

    def _questions(self, questions, room):
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in questions:
            if len(ids) + len(question) + len(answer) > room:
                continue
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        return ids, labels

    def _interleave(self, groups):
        """All facts in one random order that keeps the order inside each group."""
        owners = self.rng.permutation([i for i, group in enumerate(groups) for _ in group])
        queues = [iter(group) for group in groups]
        return [next(queues[i]) for i in owners]

    def _haystack(self, facts, text_tokens):
        rng = self.rng
        gaps = len(facts) + 1
        kept = max(1, min(gaps, text_tokens // 24))  # real text comes in stretches, not in splinters
        share = np.zeros(gaps)
        share[rng.choice(gaps, kept, replace=False)] = rng.dirichlet(np.full(kept, 0.7))
        ends = np.round(np.cumsum(share) * text_tokens).astype(int)
        sizes = np.diff(ends, prepend=0)
        ids: list[int] = []
        labels: list[int] = []
        for gap, size in enumerate(sizes):
            if size:
                start = int(rng.choice(self.breaks))
                chunk = self.corpus[start : start + size].tolist()
                ids += chunk
                chosen = rng.random(size) < 0.2
                chosen[0] = False
                labels += np.where(chosen, chunk, IGNORED).tolist()
            if gap < len(facts):
                ids += facts[gap]
                labels += [IGNORED] * len(facts[gap])
        return ids, labels

    def batch(self, size: int, length: int, span: int = 0) -> Batch:
        """`size` documents. With `span` > `length`, positions jump at random places and reach up to `span`.

        Jumps (as in positional skip-wise training, Zhu et al. 2023) teach long distances at the price of short rows.
        """
        rows = [self.document(length) for _ in range(size)]
        ids, answers, text = (np.array(part, dtype=np.int64) for part in zip(*rows, strict=True))
        positions = np.tile(np.arange(length), (size, 1))
        if span > length:
            for row in positions:
                cuts = self.rng.integers(1, length, size=3)
                jumps = self.rng.dirichlet(np.ones(4))[:3] * (span - length)
                for cut, jump in zip(cuts, jumps, strict=True):
                    row[cut:] += int(jump)
        return Batch(ids, positions, answers, text)
