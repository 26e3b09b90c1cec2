"""The built-in `mask` and `mask-causal` answer what they never saw, in fewer forwards where masks are filled together."""

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


@pytest.fixture(scope="module")
def causal():
    return laconic.load("mask-causal")


def answers(built_in, method: str) -> tuple[int, int, int]:
    """Right answers of twelve held-out questions, forwards and computed rows."""
    model, tokenizer = built_in
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


def test_wedlm_fills_several_masks_with_causal_attention(causal):
    one_by_one, several = answers(causal, "wedlm(window=1, entropy=0)"), answers(causal, "wedlm")
    assert one_by_one[0] >= 9 and several[0] >= 8
    assert several[1] < 0.7 * one_by_one[1]


def test_mask_causal_also_writes_from_left_to_right(causal):
    asked = list(itertools.islice(questions(5, held_out=True, kinds=KINDS), 12))
    said = [laconic.generate(causal, question.prompt, max_new_tokens=32)["text"] for question in asked]
    assert sum(text == question.answer for text, question in zip(said, asked, strict=True)) >= 9


def test_each_needs_its_own_methods(mask, causal):
    ids = mask[1]("copy: river =", return_tensors="pt")["input_ids"]
    with pytest.raises(laconic.LaconicError, match="causal attention, such as 'mask-causal'"):
        diffuse(mask[0], ids, "wedlm")
    with pytest.raises(laconic.LaconicError, match="full attention, such as 'mask'"):
        diffuse(causal[0], ids, "fast_dllm")
