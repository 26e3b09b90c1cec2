from __future__ import annotations

import pytest
import torch
from diffusion import MASK, make, one_per_step, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError
from laconic.decoding import learn2pd
from laconic.decoding.canvas import Prediction, Run
from laconic.decoding.diffuse import diffuse
from laconic.decoding.full_canvas import FullCanvas
from laconic.decoding.learn2pd import Oracle, make_filter, traces, train_filter
from laconic.evaluation.calibration import calibration_texts
from laconic.profiles import Profile, fingerprint, make_profile, weights_to_json
from laconic.registry import get

NEW = 40


@pytest.fixture(scope="module")
def model():
    return make()


def constant(value: float) -> torch.nn.Module:
    """A filter that says ``sigmoid(value)`` everywhere."""
    network = make_filter(32)
    with torch.no_grad():
        network[2].weight.zero_()
        network[2].bias.fill_(value)
    return network


@pytest.fixture
def profile(tmp_path):
    def write(model, network):
        path = tmp_path / "filter.json"
        tables = {"block": 32, "weights": weights_to_json(network)}
        Profile("learn2pd", fingerprint(model), 0, "", tables).save(path)
        return str(path)

    learn2pd.find_profile.__globals__["_load"].cache_clear()
    yield write
    learn2pd.find_profile.__globals__["_load"].cache_clear()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 8, 32]))
def test_the_oracle_gives_the_reference_back(seed, block):
    model, ids = make(seed=seed % 5), prompt(seed=seed)
    slow, again = Run(model, ids, NEW), Run(model, ids, NEW)
    with torch.inference_mode():
        FullCanvas(block=block).decode(slow)
        FullCanvas(block=block).decode_with(again, Oracle(slow.ids, block))
    assert torch.equal(slow.ids, again.ids) and not bool(again.open.any())


def test_traces_are_confidences_and_what_is_right(model):
    confidences, right = traces(model, prompt()[0], 32, new=40)
    assert confidences.shape == right.shape and confidences.shape[1] == 32
    assert float(confidences.min()) > 0 and float(confidences.max()) <= 1
    assert bool((confidences[-1, 8:] == 1).all() and right[-1, 8:].all()), "the last block has 8 positions"
    assert 0 < float(right.float().mean()) < 1


def test_a_filter_that_accepts_nothing_leaves_one_token_per_step(profile, model):
    path = profile(model, constant(50.0))
    out = diffuse(model, prompt(), get("learn2pd", threshold=1.0, end=False, profile=path), max_new_tokens=NEW)
    assert torch.equal(out.ids, one_per_step(model, prompt(), NEW, 32)) and out.forwards == NEW


def test_a_filter_that_accepts_everything_takes_one_step_per_block(profile, model):
    out = diffuse(model, prompt(), get("learn2pd", end=False, profile=profile(model, constant(50.0))), max_new_tokens=NEW)
    assert out.forwards == 2 and [len(step.positions[0]) for step in out.steps] == [32, 8]


def test_the_filter_sees_the_block_and_what_is_missing_counts_as_final():
    seen_by = []

    def network(x):
        seen_by.append(x)
        return x * 0 + torch.arange(32.0)[None] - 2.5

    logits = torch.randn(1, 6, 9)
    tokens, open_ = logits.argmax(-1), torch.tensor([[True, False, True, True, False, True]])
    seen = Prediction(torch.arange(6), logits, tokens, open_)
    taken = get("learn2pd", threshold=0.5)._choose(network, seen)
    assert bool((seen_by[0][:, 6:] == 1).all()) and torch.equal(seen_by[0][:, :6], seen.probability)
    best = int(seen.probability.masked_fill(~open_, -1).argmax())
    assert taken[0].nonzero()[:, 0].tolist() == sorted({3, 5, best})


def after(method, tokens, taken, confidence, length=12):
    """The length of the canvas after a step over its last 8 positions, where token 7 ends the text."""
    model = make(end=7)
    run = Run(model, prompt(4), length - 4)
    logits = torch.zeros(1, len(tokens), 97)
    for i, (token, c) in enumerate(zip(tokens, confidence, strict=True)):
        logits[0, i, token] = torch.tensor(96 * c / (1 - c)).log()
    seen = run.prediction(torch.arange(4, 4 + len(tokens)), logits)
    assert seen.tokens[0].tolist() == tokens
    get("learn2pd", **method).after(run, seen, torch.tensor([[i in taken for i in range(len(tokens))]]))
    return run.length


def test_the_canvas_is_cut_at_the_end_of_the_text():
    tokens, sure = [5, 7, 5, 7, 7, 5, 7, 7], [0.9, 0.4, 0.9, 0.6, 0.5, 0.9, 0.8, 0.7]
    assert after({}, tokens, {0, 4, 3}, sure) == 8, "behind the leftmost one committed"
    assert after({}, tokens, {0}, sure) == 11, "behind the surest one in sight"
    assert after({"end_confidence": 0.9}, tokens, {0}, sure) == 12, "which is not sure enough"
    assert after({"end": False}, tokens, {0, 3}, sure) == 12
    assert after({}, [5] * 8, {0}, sure) == 12, "no end in sight"


def test_cutting_keeps_everything_before(profile):
    """Nothing committed before the cut is lost, and the forwards become shorter."""
    free = diffuse(make(), prompt(), "full_canvas", max_new_tokens=NEW)
    end = int(free.ids[0, 20])
    model = make(end=end)
    path = profile(model, constant(-50.0))
    committed = {}

    def note(step, ids):
        committed.update(zip(step.positions[0], step.tokens[0], strict=True))

    out = diffuse(model, prompt(), get("learn2pd", profile=path), max_new_tokens=NEW, on_step=note)
    whole = diffuse(model, prompt(), get("learn2pd", profile=path, end=False), max_new_tokens=NEW)
    assert [committed[i] for i in range(out.lengths[0])] == out.ids[0].tolist()
    assert out.rows < whole.rows and MASK not in out.ids[0].tolist()


def test_the_filter_learns_a_rule_that_no_threshold_can_say(monkeypatch):
    """Right are the positions whose left neighbour is confident."""
    monkeypatch.setattr(learn2pd, "STEPS", 400)
    inputs = torch.rand(400, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.nn.functional.pad(inputs[:, :-1], (1, 0)) > 0.5
    network = train_filter(inputs[:300], labels[:300], seed=0)
    right = ((network(inputs[300:]) > 0) == labels[300:]).float().mean()
    assert float(right) > 0.9
    assert torch.equal(train_filter(inputs[:50], labels[:50], 3)[0].weight, train_filter(inputs[:50], labels[:50], 3)[0].weight)


def test_calibration_makes_a_profile_that_decodes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(learn2pd, "STEPS", 50)
    made = make_profile("learn2pd", model, [prompt(seed=s)[0] for s in range(4)], seed=0)
    assert made.tables["block"] == 32 and made.tables["records"] >= 3
    made.save(tmp_path / "p.json")
    out = diffuse(model, prompt(), get("learn2pd", profile=str(tmp_path / "p.json")), max_new_tokens=NEW)
    assert out.ids.shape[1] == NEW
    with pytest.raises(LaconicError, match="for blocks of 32, not 16"):
        diffuse(model, prompt(), get("learn2pd", block=16, profile=str(tmp_path / "p.json")))
    with pytest.raises(LaconicError, match="is of another model"):
        diffuse(make(seed=1), prompt(), get("learn2pd", profile=str(tmp_path / "p.json")))


def test_without_a_profile_it_says_how_to_make_one(model):
    with pytest.raises(LaconicError, match="laconic profile learn2pd"):
        diffuse(model, prompt(), "learn2pd")


def test_templates_can_be_calibrated_on(tiny):
    texts, answers = calibration_texts(tiny[1], None, "templates", 1024, 9, 1)
    assert len(texts) == len(answers) == 9 and all(ids.dim() == 1 for ids in texts)
    assert tiny[1].decode(texts[0]).startswith("copy: ")
