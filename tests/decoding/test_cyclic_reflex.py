"""CyclicReflex: the wave, which tokens it touches, and that drafts do not move it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import laconic
from laconic import LaconicError, get
from laconic.decoding.cyclic_reflex import WORDS, Thinking, single_tokens, wave
from laconic.decoding.engine import decode
from laconic.decoding.sampling import Sampling, Text
from laconic.decoding.tree import DraftTree, TreeShape
from tests import tiny

IDS, END = [5, 9, 31], 70
DRAFTS = ("prompt_lookup:6", "token_recycling:12")


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models, whose tokens are words."""
    made = ["<pad>", "</s>", *(f"w{i}" for i in range(88)), "Wait", "Ġwait", "But", "ĠWAIT", "waits", "</think>", "Alternatively"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(made)}, unk_token="<pad>"))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


def tree_of(text: Text) -> DraftTree:
    return DraftTree.chain(text.roots()[:, None])


def test_the_golden_wave():
    t = torch.tensor([0, 150, 300, 450, 600, 750, 900, 1050])
    assert wave(t, 5, 1200).tolist() == [0, 2.5, 5, 2.5, 0, -2.5, -5, -2.5]


@given(st.integers(1, 3000), st.floats(0, 10), st.integers(0, 9000))
def test_the_wave_has_its_period_mean_zero_and_turns_over_at_half_a_period(period, amplitude, start):
    t = torch.arange(start, start + period)
    values = wave(t, amplitude, period)
    assert abs(float(values.sum())) < 1e-6 * max(1, period)
    torch.testing.assert_close(values, wave(t + period, amplitude, period), rtol=0, atol=0)
    torch.testing.assert_close(values, -wave(t, amplitude, period, 0.5), rtol=0, atol=1e-8 * (1 + amplitude))
    assert float(values.abs().max()) <= amplitude + 1e-9


def test_only_the_words_change_and_only_while_the_model_thinks():
    text = Text([[3, 4], [3, END]])  # an end in the prompt is not the end of this thinking
    process = get("cyclic_reflex", amplitude=4, period=8).processor(IDS, END)
    logits = torch.randn(2, 1, 97)
    kept = logits.clone()
    for t, delta in enumerate([0, 2, 4, 2, 0, -2, -4, -2, 0, 2]):
        changed = process(logits, text, tree_of(text)) - logits
        assert changed[..., IDS].flatten().tolist() == pytest.approx([delta] * 6, abs=1e-5), t
        assert not changed.index_fill(-1, torch.tensor(IDS), 0.0).any()
        for row in text.rows:
            row.append(8)
    text.rows[1].append(END)
    text.rows[0].append(8)
    for _ in range(3):
        changed = (process(logits, text, tree_of(text)) - logits)[:, 0, 9]
        assert changed[1] == 0
        assert float(changed[0]) == pytest.approx(float(wave(torch.tensor(text.written(0)), 4, 8)), abs=1e-5)
        for row in text.rows:
            row.append(8)
    assert torch.equal(logits, kept)


def test_no_amplitude_is_the_identity_and_it_stops_at_its_end():
    text, logits = Text([[3, 4]]), torch.randn(1, 1, 97)
    text.rows[0] += [8] * 30
    for recipe in ({"amplitude": 0, "period": 7}, {"period": 7, "until": 30}):
        assert torch.equal(get("cyclic_reflex", **recipe).processor(IDS, END)(logits, text, tree_of(text)), logits)
    on = get("cyclic_reflex", period=7, until=31).processor(IDS, END)(logits, text, tree_of(text))
    assert not torch.equal(on, logits)
    moved = get("cyclic_reflex", period=7, offset=2).processor(IDS, END)(logits, text, tree_of(text))
    assert float((moved - logits)[0, 0, 5]) == pytest.approx(float(wave(torch.tensor(32), 5, 7)), abs=1e-5)


def test_nodes_of_a_tree_stand_at_their_own_time():
    text = Text([[1, 2, 3, 8], [1, 2, 3, END]])
    text.prompts = [3, 3]
    tree = DraftTree(
        torch.tensor([[8, END, 7, 7, 6], [END, 5, 7, 7, 6]]), TreeShape(torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 0, 1, -1]]))
    )  # fmt: skip
    t, on = Thinking(END)(text, tree)
    assert t.tolist() == [[1, 2, 2, 3, 3], [1, 2, 2, 3, 1]]
    assert on.tolist() == [[True, False, True, False, True], [False] * 5]
    assert Thinking(None)(text, tree)[1].all()


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("recipe", [
    "cyclic_reflex(period=12,amplitude=8,words=w5 w9 w31,end=w20)", "thought_penalty(amount=4,until=25,words=w5 w9 w31,end=)",
    "budget_forcing(least=20,words=w5,end=w20)",
])  # fmt: skip
def test_drafted_text_is_undrafted_text(name, recipe):
    model, inputs, tokenizer = tiny.shared(name), tiny.prompt(3, 40, pads=(0, 7, 3)), words()
    plain = decode(model, inputs, max_new_tokens=50)
    alone = decode(model, inputs, recipe, max_new_tokens=50, tokenizer=tokenizer)
    for draft in DRAFTS:
        drafted = decode(model, inputs, f"{recipe} + {draft}", max_new_tokens=50, tokenizer=tokenizer)
        assert drafted.rows == alone.rows
    if "cyclic" in recipe:
        assert alone.rows != plain.rows


def test_with_a_large_amplitude_words_come_in_the_first_half_of_a_period():
    model, inputs, tokenizer = tiny.build("llama", sharpen=1.0), tiny.prompt(4, 20), words()
    recipe = "cyclic_reflex(period=20,amplitude=30,words=w5,end=)"
    out = decode(model, inputs, recipe, max_new_tokens=80, sampling=Sampling(temperature=1.0), tokenizer=tokenizer)
    rate = (np.array(out.rows) == 7).reshape(-1, 20).mean(0)  # token 7 writes w5
    assert rate[3:8].mean() > 0.9 and rate[12:19].mean() == 0


def test_budget_forcing_puts_a_word_in_the_place_of_an_early_end():
    process = get("budget_forcing", least=3, words="Wait").processor([9], END)
    text, logits = Text([[3, 4]]), torch.zeros(1, 1, 97)
    logits[..., END] = 2.0
    assert int(process(logits, text, tree_of(text)).argmax()) == 9
    logits[..., 12] = 3.0  # it goes on anyway: the end is barred, nothing forced
    left = process(logits, text, tree_of(text))
    assert int(left.argmax()) == 12 and left[0, 0, END] == -torch.inf and left[0, 0, 11] == 0
    text.rows[0] += [8, 8, 8]
    assert torch.equal(process(logits, text, tree_of(text)), logits)


def test_words_are_found_by_what_tokens_write():
    tokenizer = words()
    vocabulary = tokenizer.get_vocab()
    paper = single_tokens(WORDS.split(), tokenizer)
    assert paper == sorted(vocabulary[word] for word in ("Wait", "But", "Alternatively"))
    both = single_tokens(["wait"], tokenizer, variants=True)
    assert both == sorted(vocabulary[word] for word in ("Wait", "Ġwait", "ĠWAIT"))
    with pytest.raises(LaconicError, match="variants=true"):
        single_tokens(["wait"], tokenizer)
    with pytest.raises(LaconicError, match="give other words"):
        single_tokens(["perhaps"], tokenizer, variants=True)


def test_the_built_in_tokenizer_has_words_with_a_space_in_front():
    tokenizer = laconic.load("needle")[1]
    found = single_tokens(["but"], tokenizer, variants=True)
    assert " but" in {tokenizer.decode([token]) for token in found}


def test_what_is_missing_is_one_sentence():
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 10)
    with pytest.raises(LaconicError, match="give decode the tokenizer"):
        decode(model, inputs, "cyclic_reflex")
    with pytest.raises(LaconicError, match="no token '</stop>'"):
        decode(model, inputs, "cyclic_reflex(end=</stop>)", tokenizer=words())
    with pytest.raises(LaconicError, match="needs the token that ends"):
        get("budget_forcing", end="")
    decode(model, inputs, "cyclic_reflex", max_new_tokens=2, tokenizer=words())  # the words and the end of the paper


def test_processors_come_before_temperature_top_k_and_top_p_as_in_transformers():
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from laconic.decoding.sampling import repetition_penalty

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids, logits = torch.randint(0, 97, (3, 12), generator=generator), 3 * torch.randn(3, 97, generator=generator)
        theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(0.6), TopKLogitsWarper(20),
                                      TopPLogitsWarper(0.8)])(ids, logits.clone()).softmax(-1)  # fmt: skip
        sampling, text = Sampling(0.6, 20, 0.8, (repetition_penalty(1.7),)), Text(ids.tolist())
        ours = sampling.law(sampling.scores(logits[:, None], text, tree_of(text)))[:, 0]
        torch.testing.assert_close(ours, theirs)
