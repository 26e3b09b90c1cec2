"""A thousand tokens of the built-in text model: every drafter that promises the greedy text gives it, token by token."""

from __future__ import annotations

import functools

import pytest

import laconic
from laconic import registry
from laconic.decoding.base import DraftMethod
from laconic.decoding.engine import decode

TOKENS = 1000
SEEING = {"flash_sd"}  # drafts for a model that sees
PROMISING = [
    row["id"] for row in laconic.methods()
    if issubclass(registry.find(row["id"]), DraftMethod) and row["guarantee"] == "exact in distribution"
]  # fmt: skip


@functools.cache
def plain():
    model, tokenizer = laconic.load("story")
    inputs = dict(tokenizer("def read(self, name):\n    The whale, as he said,", return_tensors="pt"))
    return model, inputs, decode(model, inputs, max_new_tokens=TOKENS).rows


def test_the_engine_alone_gives_what_transformers_gives():
    model, inputs, expected = plain()
    ids = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == expected[0]


@pytest.mark.parametrize("draft", sorted(set(PROMISING) - SEEING))
def test_a_thousand_tokens_are_the_greedy_ones(draft):
    model, inputs, expected = plain()
    out = decode(model, inputs, draft, max_new_tokens=TOKENS)
    assert out.rows == expected
    assert out.forwards < TOKENS
