"""transformers' generate with the engine inside: the same ids as without."""

from __future__ import annotations

import pytest
import torch

from laconic import LaconicError
from laconic.decoding import custom_generate
from tests import tiny

RECIPES = ("dense", "token_recycling:8", "prompt_lookup:4")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("options", [
    {}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 10, "eos_token_id": [5, 9, 11]},
    {"eos_token_id": list(range(2, 30))},
])  # fmt: skip
def test_the_greedy_ids_are_those_without(recipe, options):
    model, inputs = tiny.shared("llama"), tiny.prompt(3, 20, pads=(0, 5, 2))
    expected = tiny.generate(model, inputs, 24, **options)
    assert torch.equal(tiny.generate(model, inputs, 24, custom_generate=custom_generate(recipe), **options), expected)


def test_sampling_obeys_the_seed_and_the_warpers():
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 20)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(tiny.generate(model, inputs, 12, do_sample=True, top_k=1, custom_generate=custom_generate("prompt_lookup:4")))
    assert torch.equal(*runs)
    assert torch.equal(runs[0], tiny.generate(model, inputs, 12))  # of one candidate the likeliest is drawn


def test_what_it_cannot_do_is_one_sentence():
    with pytest.raises(LaconicError, match="leave beams"):
        tiny.generate(tiny.shared("llama"), tiny.prompt(1, 9), 4, num_beams=2, custom_generate=custom_generate("prompt_lookup"))
