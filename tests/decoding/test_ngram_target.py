"""Drafters on real text at no model's cost: the target is a back-off n-gram of characters, whose law is known."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from laconic.decoding.base import Step
from laconic.decoding.sampling import Sampling, Text
from laconic.decoding.verify import match
from laconic.evaluation.haystack import reference_text
from laconic.recipe import Recipe

ORDER, WEIGHT, PROMPT, NEW = 5, 1.5, 300, 250


class Target:
    """p <- (count + 1.5 p) / (total + 1.5), from no context to five characters, learned from 95 % of the text."""

    def __init__(self, text: str) -> None:
        letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
        ids, cut = [letters[letter] for letter in text], int(len(text) * 0.95)
        self.vocabulary, self.held_out = len(letters), ids[cut:]
        self.counts = defaultdict(Counter)
        for end in range(cut):
            for size in range(min(ORDER, end) + 1):
                self.counts[tuple(ids[end - size : end])][ids[end]] += 1
        self.law = functools.cache(self._law)

    def _law(self, context: tuple[int, ...]) -> np.ndarray:
        p = np.full(self.vocabulary, 1 / self.vocabulary)
        for size in range(len(context) + 1):
            row = self.counts.get(context[len(context) - size :])
            if row is None:
                break
            p = p * WEIGHT
            p[list(row)] += list(row.values())
            p /= sum(row.values()) + WEIGHT
        return p

    def scores(self, ids: list[int], tree) -> torch.Tensor:
        """Log-probabilities after every node, ``(1, nodes, vocabulary)``."""
        before, rows = [(*ids[-ORDER:],)], []
        for node, parent in enumerate(tree.shape.parents[0].tolist()):
            if parent >= 0:
                before.append((*before[parent], int(tree.tokens[0, node]))[-ORDER:])
            rows.append(self.law(before[node]))
        return torch.from_numpy(np.log(np.stack(rows)))[None].float()

    def write(self, recipe: str, start: int, drafter=None, temperature: float = 0.0):
        """Text of ``NEW`` characters, the characters per evaluation, and the drafter."""
        text, sampling = Text([self.held_out[start : start + PROMPT]]), Sampling(temperature=temperature)
        generator = torch.Generator().manual_seed(start)
        setting = SimpleNamespace(
            text=text, vocabulary=self.vocabulary, generator=generator, sampling=sampling,
            model=SimpleNamespace(device=torch.device("cpu")),
        )  # fmt: skip
        drafter = drafter or Recipe.parse(recipe).methods[0].drafter(setting)
        ids, steps = text.rows[0], 0
        while text.written(0) < NEW:
            tree = drafter.propose(text, 100)
            scores = self.scores(ids, tree)
            verdict = match(tree, sampling.choose(scores, generator))
            path = [node for node in verdict.path[0].tolist() if node > 0]
            ids += [*tree.tokens[0, path].tolist(), int(verdict.token)]
            steps += 1
            drafter.observe(Step(tree, None, scores, verdict), text)
        return ids[PROMPT : PROMPT + NEW], text.written(0) / steps, drafter


@functools.cache
def target() -> Target:
    return Target(reference_text(held_out=False)[:150_000])


@functools.cache
def rate(recipe: str, temperature: float = 0.0) -> float:
    """Characters per evaluation, mean over three prompts."""
    return float(np.mean([target().write(recipe, start, temperature=temperature)[1] for start in (0, 2000, 4000)]))


DRAFTS = ("token_recycling:24", "trigram_mcts:24", "suffix_automaton:8", "suffix_automaton(follow=often):8", "prompt_lookup:8")


@pytest.mark.parametrize("recipe", DRAFTS)
def test_the_text_is_the_greedy_one(recipe):
    plain, ids = [], target().held_out[:PROMPT]
    for _ in range(NEW):
        plain.append(int(target().law(tuple([*ids, *plain][-ORDER:])).argmax()))
    assert target().write(recipe, 0)[0] == plain


def test_more_nodes_of_token_recycling_draft_more():
    small, large = rate("token_recycling:8"), rate("token_recycling:40")
    assert 1.4 <= small < large
    assert large - 0.3 < rate("token_recycling:80")  # a plateau


def test_a_second_pass_changes_little():
    _, first, drafter = target().write("token_recycling:40", 0)
    _, second, _ = target().write("token_recycling:40", 0, drafter)
    assert second > 1.4 and abs(first - second) < 0.5


@pytest.mark.parametrize("recipe", DRAFTS[:3])
def test_drafts_are_accepted_when_text_is_sampled(recipe):
    assert rate(recipe, 1.0) > 1.1


def test_the_suffix_automaton_is_no_worse_than_prompt_lookup():
    assert rate("suffix_automaton:8") > 0.95 * rate("prompt_lookup:8")


def test_the_prompt_is_a_good_start_of_the_trigrams():
    assert rate("trigram_mcts(observe_prompt=true):24", 1.0) > rate("trigram_mcts:24", 1.0)


if __name__ == "__main__":
    for temperature in (0.0, 1.0):
        for recipe in (*DRAFTS, *(f"token_recycling:{n}" for n in (8, 20, 40, 80)), "trigram_mcts(observe_prompt=true):24",
                       "trigram_mcts(reward=constant):24"):  # fmt: skip
            print(f"{temperature} {recipe:40} {rate(recipe, temperature):.2f}")
