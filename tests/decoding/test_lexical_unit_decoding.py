"""Lexical Unit Decoding: spans are said where the model is sure, and what is not looked at is still computed from real tokens."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from laconic import LaconicError, get
from laconic.decoding.engine import decode
from laconic.decoding.lexical_unit_decoding import MARK
from laconic.decoding.sampling import Sampling
from laconic.decoding.tree import DraftTree, TreeShape
from laconic.decoding.verify import trust
from laconic.models.train_lexical_units import choose_units, fine_tune, pad_token, training_mask, unit_loss, units
from tests import tiny
from tests.decoding.drafts import CYCLE, TEXT, known, taught


@pytest.fixture(scope="module")
def models():
    """Two tiny models that know a text by heart, and say it in units."""
    made = {}
    for name in ("llama", "qwen3"):
        model = copy.deepcopy(taught(name))
        fine_tune(model, TEXT.numpy(), pad=0, steps=80, rate=0.01, window=32, sure=0.8)
        made[name] = model.eval()
    return made


def test_units_are_runs_of_sure_tokens():
    sure = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    assert units(sure, 4).tolist() == [[0, 4, 0, 0, 0, 1, 0, 2, 0, 0, 1], [4, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0]]
    cuts, lengths = choose_units(units(sure, 4), 4)
    found = [sorted(zip(c, n, strict=True)) for c, n in zip(cuts.tolist(), lengths.tolist(), strict=True)]
    assert [[pair for pair in row if pair[1]] for row in found] == [[(1, 4), (7, 2)], [(4, 4), (8, 2)]]  # none at token 0


def test_pad_rows_see_the_text_before_their_unit_only():
    cuts = torch.tensor([[3, 5]])
    sees = training_mask(cuts, 6, 2, torch.float32)[0, 0] == 0
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[:6, :6] = torch.ones(6, 6).tril().bool()
    for row, (cut, before) in enumerate([(3, []), (5, []), (3, [6]), (5, [7])]):
        expected[6 + row, [*range(cut), *before, 6 + row]] = True
    assert torch.equal(sees, expected)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_loss_is_that_of_examples_one_by_one(name):
    model, ids = tiny.build(name), tiny.prompt(1, 12)["input_ids"]
    with torch.no_grad():
        law = model(input_ids=ids).logits.softmax(-1)
    sure = law[0, :-1].gather(1, ids[0, 1:, None])[:, 0].sort().values[4].item()  # seven of eleven tokens
    found = [(s, n) for s, n in enumerate(units(torch.nn.functional.pad(
        law[:, :-1].gather(2, ids[:, 1:, None])[..., 0] >= sure, (1, 0)), 4)[0].tolist()) if n > 1]  # fmt: skip
    assert found
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
        text = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
        parts = []
        for start, length in found:
            example = torch.cat([ids[0, :start], torch.zeros(length - 1, dtype=torch.int64)])
            said = model(input_ids=example[None]).logits[0, start:]
            parts.append(torch.nn.functional.cross_entropy(said, ids[0, start + 1 : start + length], reduction="none"))
        loss = unit_loss(model, model, ids, pad=0, sure=sure, places=6)
    torch.testing.assert_close(loss, text + torch.cat(parts).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_without_trust_it_is_greedy_decoding(name, models):
    model, inputs = models[name], tiny.prompt(3, 40, pads=(0, 7, 3))
    inputs["input_ids"][0] = known(1)["input_ids"][0].repeat(2)[:40]
    plain = decode(model, inputs, max_new_tokens=40)
    careful = decode(model, inputs, "lexical_unit_decoding(confidence=1.5)", max_new_tokens=40)
    assert careful.rows == plain.rows and careful.forwards == plain.forwards
    for confidence in (0.0, 0.5, 0.9):
        out = decode(model, inputs, f"lexical_unit_decoding(confidence={confidence},verifier=match)", max_new_tokens=40)
        assert out.rows == plain.rows and out.forwards <= plain.forwards


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_text_that_is_known_is_said_in_units(name, models):
    """Faster than a token a forward, with few slips; when it is careful there is none."""
    after, right = dict(itertools.pairwise([*CYCLE.tolist(), int(CYCLE[0])])), []
    for confidence in (1.5, 0.8):
        out = decode(models[name], known(), f"lexical_unit_decoding(confidence={confidence})", max_new_tokens=40)
        right.append(sum(after.get(a) == b for row in out.rows for a, b in itertools.pairwise(row)) / 78)
    assert out.tokens_per_forward > 1.5 and len(out.accepted) <= 4
    assert right[0] == 1 and right[1] > 0.75


@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.7])
def test_spans_are_bounded_and_texts_complete(models, confidence):
    for ahead in (1, 2, 5):
        steps = []
        recipe = f"lexical_unit_decoding(confidence={confidence}):{ahead}"
        out = decode(models["llama"], tiny.prompt(3, 30, pads=(0, 5, 2)), recipe, max_new_tokens=25, watch=steps.append)
        assert [len(row) for row in out.rows] == [25] * 3 and out.forwards <= 25
        assert all(len(new) <= ahead + 1 for step in steps for new in step.new)
        assert all(step.accepted[row] == [*range(1, len(step.tokens[row]))] for step in steps[1:] for row in range(3))


def test_of_one_context_spans_do_not_grow_with_the_confidence(models):
    """The second forward's span is that of the context prompt + first token, whatever the confidence."""
    model, lengths = models["llama"], []
    for confidence in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.5):
        steps = []
        recipe = f"lexical_unit_decoding(confidence={confidence}):6"
        decode(model, known(4), recipe, max_new_tokens=20, watch=steps.append)
        lengths.append([len(tokens) for tokens in steps[2].tokens])
    for less, more in itertools.pairwise(lengths):
        assert all(b <= a for a, b in zip(less, more, strict=True))
    assert lengths[0] > lengths[-1] == [1] * 4


def test_the_cache_is_that_of_the_tokens_that_were_said(models):
    """Keys and values come from real tokens: those of a fresh prefill of prompt and answer."""
    model, held = models["llama"], []
    from laconic.decoding import engine

    class Kept(engine.Runner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            held.append(self)

    original, engine.Runner = engine.Runner, Kept
    try:
        out = decode(model, known(2), "lexical_unit_decoding(confidence=0.5)", max_new_tokens=31)
    finally:
        engine.Runner = original
    assert out.tokens_per_forward > 1.5
    runner = held[0]
    with torch.inference_mode():
        runner.cache.close_gaps()
    for row in range(2):
        ids = torch.cat([known(2)["input_ids"][row], torch.tensor(out.rows[row])])
        plain = runner.handle.cache()
        n = min(int(runner.lengths[row]), len(ids) - 1)  # a row that is finished is fed on, and nobody reads it
        with torch.no_grad(), runner.handle:
            model(input_ids=ids[None, :n], cache=plain, use_cache=True)
        for ours, fresh in zip(runner.cache.layers, plain.layers, strict=True):
            own = (ours.positions[row, 0] >= 0) & (ours.positions[row, 0] < n)
            torch.testing.assert_close(ours.keys[row][:, own], fresh.keys[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.values[row][:, own], fresh.values[0], atol=1e-4, rtol=1e-4)
            assert ours.positions[row, 0, own].tolist() == list(range(n))


def test_a_token_is_not_said_twice_in_a_span(models):
    model = models["llama"]
    out = []
    decode(model, tiny.prompt(2, 20), "lexical_unit_decoding(confidence=0.0):5", max_new_tokens=40, watch=out.append,
           sampling=Sampling(temperature=1.0))  # fmt: skip
    chains = [tokens for step in out for tokens in step.tokens if len(tokens) > 1]
    assert chains and all(a != b for chain in chains for a, b in itertools.pairwise(chain))


def test_trust_takes_the_whole_chain_of_each_row():
    tree = DraftTree(torch.zeros(2, 3, dtype=torch.int64), TreeShape(torch.tensor([[-1, 0, 1], [-1, 0, -1]])))
    verdict = trust(tree, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert verdict.path.tolist() == [[0, 1, 2], [0, 1, -1]] and verdict.token.tolist() == [3, 5]


def test_what_is_promised_and_what_is_refused():
    assert get("lexical_unit_decoding").promise == "lossy"
    assert get("lexical_unit_decoding", verifier="match").promise == "exact in distribution"
    model = tiny.build("llama")
    assert not hasattr(model.config, MARK)
    with pytest.raises(LaconicError, match="train_lexical_units"):
        decode(model, tiny.prompt(1, 10), "lexical_unit_decoding", max_new_tokens=4)


def test_a_tokenizer_without_pad_gets_one():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 97)}}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    model = tiny.build("llama")
    assert pad_token(model, tokenizer) == 97 == model.config.pad_token_id
    assert model.get_input_embeddings().num_embeddings == 98
    assert pad_token(model, tokenizer) == 97
