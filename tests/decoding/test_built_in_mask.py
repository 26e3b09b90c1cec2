"""The built-in `mask`: it answers questions that it never saw, and methods that fill in several masks need fewer forwards."""

from __future__ import annotations

import itertools

import pytest

import laconic
from laconic.decoding.diffuse import diffuse
from laconic.models.templates import questions

KINDS = ("reverse", "sort", "lookup")


@pytest.fixture(scope="module")
def mask():
    return laconic.load("mask")


def answers(mask, method: str) -> tuple[int, int, int]:
    """Right answers of twelve held-out questions, forwards and computed rows."""
    model, tokenizer = mask
    right = forwards = rows = 0
    for question in itertools.islice(questions(3, held_out=True, kinds=KINDS), 12):
        ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        out = diffuse(model, ids, method, max_new_tokens=64)
        right += tokenizer.decode(out.ids[0], skip_special_tokens=True) == question.answer
        forwards, rows = forwards + out.forwards, rows + out.rows
    return right, forwards, rows


def test_fewer_forwards_for_nearly_the_same_answers(mask):
    right, forwards, rows = answers(mask, "full_canvas")
    assert right >= 9
    for method, least in (("fast_dllm(threshold=0.97)", 9), ("local_leap", 7), ("learn2pd", 7)):  # its filter comes with it
        fewer = answers(mask, method)
        assert fewer[0] >= least and fewer[1] < forwards / 3 and fewer[2] < rows / 3


def test_a_cache_saves_rows_where_a_block_takes_many_forwards(mask):
    right, _, rows = answers(mask, "full_canvas")
    cached = answers(mask, "full_canvas(plan=dual)")
    assert cached[0] >= right - 2 and cached[2] < rows / 2
