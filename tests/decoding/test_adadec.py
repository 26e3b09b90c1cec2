"""AdaDec: what is gated, that rescoring is what its definition says, and that nothing else changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError, get
from laconic.decoding.adadec import LookAhead, entropy, fit_threshold, logistic, python_body_ends
from laconic.decoding.base import Setting
from laconic.decoding.engine import decode
from laconic.decoding.runner import Runner
from laconic.decoding.sampling import Sampling, Text, repetition_penalty
from laconic.hooks import apply
from laconic.profiles import make_profile
from tests import tiny

NAMES = ("llama", "gpt_neox")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", [
    "adadec(threshold=inf)", "adadec(threshold=0,lookahead=0)", "adadec(threshold=0,candidates=1)",
])  # fmt: skip
def test_without_a_look_ahead_it_is_greedy(name, recipe):
    model, inputs = tiny.shared(name), tiny.prompt(2, 30, pads=(0, 4))
    plain = decode(model, inputs, max_new_tokens=25)
    out = decode(model, inputs, recipe, max_new_tokens=25)
    assert out.rows == plain.rows and out.forwards == plain.forwards and out.figures["forwards"] == 0
    assert out.figures["gated"] == (0 if "inf" in recipe else 50)


def brute(model, ids, candidates, lookahead, ends=(), sums=False, past=False, penalty=None):
    """The candidate that the definition prefers, by running the model on whole texts."""
    def logs(text):
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        if penalty:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[text] = True
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        return logits.double().log_softmax(-1)

    top = logs(ids).topk(candidates)
    scores = []
    for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        text, total, length = [*ids, token], value, 1
        while length <= lookahead and (past or text[-1] not in ends):
            best = logs(text).max(-1)
            text, total, length = [*text, int(best.indices)], total + float(best.values), length + 1
        scores.append(total if sums else total / length)
    return top.indices.tolist()[int(np.argmax(scores))], scores


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"sums": True}, {"ends": True}, {"ends": True, "past": True}, {"penalty": 1.4}])
@torch.inference_mode()
def test_every_choice_is_that_of_brute_force(name, options):
    model, inputs = tiny.build(name, sharpen=2.0), tiny.prompt(2, 20, pads=(0, 3))
    penalty = options.get("penalty")
    sampling = Sampling(processors=(repetition_penalty(penalty),) if penalty else ())
    ends = list(range(2, 40)) if options.get("ends") else []  # many, so that roll-outs end; the texts go on in brute force
    past, sums = options.get("past", False), options.get("sums", False)
    recipe = f"adadec(threshold=0,lookahead=3,candidates=4,sums={sums},past_ends={past})"
    out = decode(model, inputs, recipe, max_new_tokens=6, sampling=sampling, ends=ends)
    differs = 0
    for row, new in enumerate(out.rows):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row] > 0].tolist()
        for token in new:
            best, _ = brute(model, ids, 4, 3, ends, sums, past, penalty)
            assert token == best
            differs += token != brute(model, ids, 1, 0, penalty=penalty)[0]
            ids.append(token)
    if not options:
        assert differs > 0  # it is no greedy text in disguise


@torch.inference_mode()
def test_scores_are_sums_over_lengths_and_the_cache_is_left_as_it_was():
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 20)
    text = Text(inputs["input_ids"].tolist())
    with apply(model, "dense") as handle:
        runner = Runner(handle)
        logits = runner.prefill(inputs).logits[:, -1]
        keys = [layer.keys.clone() for layer in runner.cache.layers]
        look = LookAhead(get("adadec", threshold=0), 0.0, Setting(model, text, Sampling(), torch.Generator()))
        best, scores = look.rate(runner, logits, text, torch.arange(2))
        assert all(torch.equal(layer.keys, before) for layer, before in zip(runner.cache.layers, keys, strict=True))
        assert runner.lengths.tolist() == [20, 20] and runner.forwards == 1
    assert (look.forwards, look.nodes) == (5, 30)
    for row in range(2):
        ids, expected = brute(model, text.rows[row], 3, 5)
        torch.testing.assert_close(scores[row], torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-4)
        assert int(best[row, scores[row].argmax()]) == ids


def test_forwards_stay_within_their_bound_and_rows_are_gated_on_their_own():
    model, inputs = tiny.shared("llama"), tiny.prompt(3, 30, pads=(0, 7, 3))
    with torch.inference_mode():
        limit = float(entropy(model(**inputs).logits).median())
    out = decode(model, inputs, f"adadec(threshold={limit})", max_new_tokens=20)
    figures = out.figures
    assert 0 < figures["gated"] < figures["steps"] == 60
    assert figures["nodes"] <= figures["gated"] * 3 * 5 and figures["forwards"] <= figures["gated"] * 5
    assert out.forwards == 20 + figures["forwards"]
    for row in range(3):
        alone = {name: value[row : row + 1, inputs["attention_mask"][row] > 0] for name, value in inputs.items()}
        assert decode(model, alone, f"adadec(threshold={limit})", max_new_tokens=20).rows[0] == out.rows[row]


def test_the_gate_reads_raw_logits_and_the_choice_what_processors_leave():
    model, inputs = tiny.build("llama", sharpen=16.0), tiny.prompt(1, 30)
    seen = []

    def flatten(logits, text, tree):
        seen.append(1)
        return logits * 0.01  # nearly uniform: a gate on these would open always

    with torch.inference_mode():
        raw = float(entropy(model(**inputs).logits[0, -1]))
    assert raw < 0.95 * math.log(tiny.VOCABULARY)
    for factor, gated in ((1.02, 0), (0.98, 1)):
        flat = decode(model, inputs, get("adadec", threshold=factor * raw), max_new_tokens=1,
                      sampling=Sampling(processors=(flatten,)))  # fmt: skip
        assert flat.figures["gated"] == gated and seen
    banned = flat.rows[0][0]

    def ban(logits, text, tree):
        return logits.index_fill(-1, torch.tensor([banned]), -math.inf)

    out = decode(model, inputs, "adadec(threshold=0)", max_new_tokens=10, sampling=Sampling(processors=(ban,)))
    assert banned not in out.rows[0]


def test_roll_outs_end_where_the_text_would():
    """With a stop rule that every text meets at once there is nothing to look ahead at."""
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 30)
    out = decode(model, inputs, "adadec(threshold=0)", max_new_tokens=5, stop=lambda row, new: True)
    assert len(out.rows[0]) == 1 and out.figures["forwards"] == 0
    past = decode(model, inputs, "adadec(threshold=0,past_ends=true)", max_new_tokens=5, stop=lambda row, new: True)
    assert past.figures["forwards"] == 1  # as published: noticed behind the first token


def test_it_looks_ahead_no_further_than_the_model_knows_positions():
    model = tiny.build("llama", max_position_embeddings=32)
    assert len(decode(model, tiny.prompt(1, 28), "adadec(threshold=0,lookahead=9)", max_new_tokens=4).rows[0]) == 4


def test_sparse_caches_are_forked_with_what_they_remember():
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 60)
    for recipe in ("streaming(recent=4):24", "tokenselect(recent=4):28"):
        alone = decode(model, inputs, recipe, max_new_tokens=15)
        out = decode(model, inputs, f"{recipe} + adadec(threshold=inf)", max_new_tokens=15)
        looked = decode(model, inputs, f"{recipe} + adadec(threshold=0,candidates=2,lookahead=2)", max_new_tokens=15)
        assert out.rows == alone.rows and looked.figures["gated"] == 15


# --- the threshold -----------------------------------------------------------------------------------------------------------
@given(st.floats(-4, -0.5), st.floats(-1, 4), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_regression_finds_what_made_the_data(slope, intercept, seed):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 4, 6000)
    y = rng.random(6000) < 1 / (1 + np.exp(-(slope * x + intercept)))
    if not 300 < y.sum() < 5700:
        return
    found = logistic(x, y)
    assert found[0] == pytest.approx(slope, rel=0.35, abs=0.25) and found[1] == pytest.approx(intercept, rel=0.35, abs=0.35)


def test_the_threshold_stands_where_right_and_wrong_part():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 3, 4000)
    table = fit_threshold(x, x < 1.2)
    assert table["threshold"] == pytest.approx(1.2, abs=0.05) and table["accuracy"] > 0.98 and table["slope"] < 0
    assert table["gated"] == pytest.approx(0.6, abs=0.05)
    noisy = fit_threshold(x, rng.random(4000) < 1 / (1 + np.exp(2 * (x - 1.0))))
    assert 0.5 < noisy["threshold"] < 1.5
    for right in (np.ones(100, bool), np.zeros(100, bool)):
        with pytest.raises(LaconicError, match="some that the model gets right"):
            fit_threshold(x[:100], right)
    with pytest.raises(LaconicError, match="does not tell"):
        fit_threshold(x, x > 1.2)


def test_entropy_is_in_nats():
    assert float(entropy(torch.zeros(8))) == pytest.approx(math.log(8), rel=1e-6)
    assert float(entropy(torch.tensor([0.0, -math.inf]))) == 0
    assert entropy(torch.randn(3, 2, 5)).shape == (3, 2)


def test_a_profile_is_made_kept_and_used(tmp_path):
    model, inputs = tiny.build("llama", sharpen=4.0), tiny.prompt(4, 40, seed=3)
    texts = [row[:20] for row in inputs["input_ids"]]
    said = decode(model, {"input_ids": inputs["input_ids"][:, :20]}, max_new_tokens=12).rows
    answers = [torch.tensor(row) for row in said]
    noise = torch.Generator().manual_seed(0)  # half of the right answers are made wrong where the model is least sure
    with torch.inference_mode():
        for text, answer in zip(texts, answers, strict=True):
            unsure = entropy(model(input_ids=torch.cat([text, answer])[None]).logits[0, 19:-1]).argsort(descending=True)[:5]
            answer[unsure] = torch.randint(2, tiny.VOCABULARY, (5,), generator=noise)
    with pytest.raises(LaconicError, match="laconic profile adadec"):
        decode(model, inputs, "adadec", max_new_tokens=2)
    made = make_profile("adadec", model, texts, 1, answers)
    made.save(tmp_path / "p.json")
    assert made.tables["tokens"] == 48
    out = decode(model, inputs, f"adadec(profile={tmp_path / 'p.json'})", max_new_tokens=6)
    given = decode(model, inputs, get("adadec", threshold=made.tables["threshold"]), max_new_tokens=6)
    assert out.rows == given.rows and out.figures == given.figures
    with pytest.raises(LaconicError, match="another model"):
        decode(tiny.shared("gpt_neox"), inputs, f"adadec(profile={tmp_path / 'p.json'})", max_new_tokens=2)


def test_what_does_not_go_together_is_one_sentence():
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 10)
    with pytest.raises(LaconicError, match="leave the temperature at 0"):
        decode(model, inputs, "adadec(threshold=1)", sampling=Sampling(temperature=1.0))
    with pytest.raises(LaconicError, match="adadec and token_recycling both say"):
        decode(model, inputs, "adadec(threshold=1) + token_recycling:8")
    with pytest.raises(LaconicError, match="is no file"):
        get("adadec", profile="nowhere.json")


def test_a_python_body_ends_at_a_line_that_is_not_indented():
    class Letters:
        @staticmethod
        def decode(ids):
            return "".join(map(chr, ids))

    stop = python_body_ends(Letters)
    for text, ended in [("x = 1", False), ("return\n    y\n", False), (" a\n\n    b", False), (" a\n    b\nd", True),
                        (" a\n# c", True), (" a\n\n\n\n\n", True), ("\n\tx", False)]:  # fmt: skip
        assert stop(0, list(map(ord, text))) == ended, text
