"""Metrics: what counts as the same text, which choice is meant, and how distributions are compared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laconic.errors import LaconicError
from laconic.evaluation import metrics


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Answer:\tParis. ", "the answer paris"),
        ("don't", "dont"),
        ("don\u2019t", "dont"),
        ("3.14 and -5", "3.14 and -5"),
        ("1,000,000", "1000000"),
        ("1,2,3", "1 2 3"),
        ("page 3-5", "page 3 5"),
        ("C++ costs $5", "c++ costs $5"),
        ("`code` **bold**", "code bold"),
        ("\uff21\uff22", "ab"),
        ("STRASSE stra\u00dfe", "strasse strasse"),
        ("!?", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert metrics.normalise(text) == normal


@given(st.text())
def test_normalise_twice_is_once(text: str) -> None:
    once = metrics.normalise(text)
    assert metrics.normalise(once) == once


@given(st.text(min_size=1))
def test_every_text_is_exactly_itself(text: str) -> None:
    assert metrics.exact(text, text) == 1.0


def test_exact_takes_the_best_answer_and_the_whole_prediction() -> None:
    assert metrics.exact(" paris.", ["London", "Paris"]) == 1.0
    assert metrics.exact("It is Paris", "Paris") == 0.0
    assert metrics.exact("!?", "!?") == 1.0
    assert metrics.exact("!", "?") == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "found"),
    [
        ("The code is 4711.", "4711", 1.0),
        ("The code is 47112.", "4711", 0.0),
        ("It was the Eiffel-Tower, I think", "eiffel tower", 1.0),
        ("It rose 3.14 percent", "314", 0.0),
        ("答えは東京です", "東京", 1.0),
        ("yes + no", "+", 1.0),
        ("really?!", "?!", 1.0),
        ("anything", "", 0.0),
        ("a b", ["c", "b"], 1.0),
    ],
)
def test_contains(prediction: str, answer: str | list[str], found: float) -> None:
    assert metrics.contains(prediction, answer) == found


def test_regex_searches_the_raw_text() -> None:
    assert metrics.regex("Code: AB-12", r"[A-Z]{2}-\d+") == 1.0
    assert metrics.regex("code: ab-12", r"[A-Z]{2}-\d+") == 0.0
    with pytest.raises(LaconicError, match="not a regular expression"):
        metrics.regex("text", "(")


CHOICES = ["New York", "New York City", "Paris", "the cat"]


@pytest.mark.parametrize(
    ("prediction", "picked"),
    [
        ("Paris", 2),
        ("I would say New York City.", 1),
        ("New York", 0),
        ("not Paris but New York", 2),
        ("B", 1),
        ("(c) because", 2),
        ("Answer: D.", 3),
        ("A cat", 0),
        ("Zebra", None),
        ("e", None),
        ("", None),
    ],
)
def test_pick_choice(prediction: str, picked: int | None) -> None:
    assert metrics.pick_choice(prediction, CHOICES) == picked


def test_choice_accepts_text_or_letter_as_answer() -> None:
    assert metrics.choice("It is paris", "Paris", CHOICES) == 1.0
    assert metrics.choice("It is paris", "C", CHOICES) == 1.0
    assert metrics.choice("It is paris", ["A", "B"], CHOICES) == 0.0
    with pytest.raises(LaconicError, match="none of the choices"):
        metrics.choice("It is paris", "Rome", CHOICES)
    with pytest.raises(LaconicError, match="needs 'choices'"):
        metrics.choice("It is paris", "Rome", None)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    assert metrics.rouge_l("the cat sat", "the cat sat") == 1.0
    # common subsequence: the, cat -> precision 2/3, recall 2/4
    assert metrics.rouge_l("the cat ran", "the black cat sat") == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert metrics.rouge_l("dog", ["cat", "dog"]) == 1.0


def test_score_refuses_unknown_metrics() -> None:
    assert metrics.score("choice", "b", "B", CHOICES) == 1.0
    assert metrics.score("contains", "a b", "b") == 1.0
    with pytest.raises(LaconicError, match="no metric 'bleu'"):
        metrics.score("bleu", "a", "a")


def test_kl_against_the_definition() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(5, 7).log_softmax(-1), torch.randn(5, 7).log_softmax(-1)
    expected = [sum(float(a.exp() * (a - b)) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    assert torch.allclose(metrics.kl(p, q), torch.tensor(expected), atol=1e-6)
    assert torch.equal(metrics.kl(p, p), torch.zeros(5))


def test_kl_with_impossible_tokens_and_with_ruled_out_ones() -> None:
    p = torch.tensor([[0.0, -torch.inf]])  # surely the first token
    assert metrics.kl(p, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(torch.tensor(2.0).log().item())
    assert metrics.kl(torch.tensor([[0.5, 0.5]]).log(), p).item() == torch.inf


def test_top1() -> None:
    dense, method = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([[1.0, 3.0], [1.0, 2.0]])
    assert metrics.top1(dense, method).tolist() == [True, False]
