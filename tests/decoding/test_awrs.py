"""AWRS: weights without bias, by enumeration; particles that follow the law of the model given the constraint."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError
from laconic.decoding.awrs import Redraw, first, geometric, recursive, visits
from laconic.decoding.constraints import Vocabulary, predicate
from laconic.decoding.engine import decode
from laconic.decoding.particles import Draw, sample
from laconic.decoding.sampling import Sampling
from laconic.hooks import apply
from tests import tiny

P = (0.4, 0.3, 0.15, 0.1, 0.05)
OK = {1, 3}


def orders(p):
    """Every order of sampling without replacement, as a list of (token, log p), with its probability."""
    for order in itertools.permutations(range(len(p))):
        left, chance = sum(p), 1.0
        for token in order:
            chance, left = chance * p[token] / left if left > 0 else 0.0, left - p[token]
        yield [(token, math.log(p[token])) for token in order], chance


def moments(p, ok, draw) -> tuple[np.ndarray, float, float]:
    """Over all orders: mean of weight x [token is t], variance of the weight, mean number of checks."""
    mean, square, checks = np.zeros(len(p)), 0.0, 0.0
    for order, chance in orders(p):
        drawn: Draw = draw(iter(order), ok.__contains__)
        weight = math.exp(drawn.weight)
        if drawn.token is not None:
            mean[drawn.token] += chance * weight
        square, checks = square + chance * weight**2, checks + chance * drawn.checks
    return mean, square - mean.sum() ** 2, checks


def test_golden_numbers_of_the_recursive_estimator():
    mean, variance, checks = moments(P, OK, recursive)
    np.testing.assert_allclose(mean, [0, 0.3, 0, 0.1, 0], atol=1e-12)
    assert variance == pytest.approx(0.0530, abs=5e-5)
    assert checks == pytest.approx(2.88, abs=5e-3)


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.sets(st.integers(0, 4)), st.sampled_from([2, 3, 4, math.inf])
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_recursive_weight_has_no_bias_for_any_law(raw, ok, limit):
    p = [value / sum(raw) for value in raw]
    mean, _, _ = moments(p, ok, lambda order, check: recursive(order, check, max_rejects=limit))
    np.testing.assert_allclose(mean, [value * (token in ok) for token, value in enumerate(p)], atol=1e-9)


def test_without_weights_the_law_is_that_of_masking():
    counts = np.zeros(5)
    for order, chance in orders(P):
        drawn = first(iter(order), OK.__contains__)
        assert drawn.weight == 0
        counts[drawn.token] += chance
    np.testing.assert_allclose(counts, [0, 0.75, 0, 0.25, 0], atol=1e-12)


def spread(p, ok, size, max_accepts, max_rejects=math.inf):
    """Weights and tokens of many draws of the geometric estimator."""
    logs, generator = torch.tensor(p, dtype=torch.float64).log(), torch.Generator().manual_seed(1)
    drawn = [geometric(Redraw(logs, order, generator), ok.__contains__, max_accepts=max_accepts, max_rejects=max_rejects)
             for order in visits(logs.expand(size, -1), generator)]  # fmt: skip
    weights = np.exp([d.weight for d in drawn])
    return weights, np.array([-1 if d.token is None else d.token for d in drawn]), np.mean([d.checks for d in drawn])


@pytest.mark.parametrize(("max_accepts", "variance"), [(2, 0.084), (4, 0.032)])
def test_golden_numbers_of_the_geometric_estimator(max_accepts, variance):
    weights, tokens, checks = spread(P, OK, 4000, max_accepts)
    means = [weights[tokens == token].sum() / len(weights) for token in range(5)]
    np.testing.assert_allclose(means, [0, 0.3, 0, 0.1, 0], atol=4 * 0.3 / 4000**0.5)
    assert weights.var() == pytest.approx(variance, rel=0.1)
    if max_accepts == 2:
        assert checks == pytest.approx(2.81, abs=0.08)


@pytest.mark.parametrize("limit", [2, 3, 6])
def test_the_geometric_weight_has_no_bias_under_any_limit(limit):
    weights, tokens, _ = spread(P, OK, 4000, 3, limit)
    means = [weights[tokens == token].sum() / len(weights) for token in range(5)]
    np.testing.assert_allclose(means, [0, 0.3, 0, 0.1, 0], atol=4 * 0.45 / 4000**0.5)


def test_two_steps_weigh_as_the_posterior_says():
    """Where masking is most wrong: the likely beginning has an unlikely rest."""
    start, rest = (0.6, 0.3, 0.1), ((0.01, 0.98, 0.01), (0.5, 0.3, 0.2), (0.2, 0.4, 0.4))
    valid = {(0, 0), (1, 0), (1, 1)}
    weighted, masked = dict.fromkeys(valid, 0.0), dict.fromkeys(valid, 0.0)
    for (one, chance), draw in itertools.product(orders(start), (recursive, first)):
        a = draw(iter(one), {0, 1}.__contains__)
        for two, more in orders(rest[a.token]):
            b = draw(iter(two), {y for x, y in valid if x == a.token}.__contains__)
            if b.token is not None:
                (weighted if draw is recursive else masked)[a.token, b.token] += chance * more * math.exp(a.weight + b.weight)
    np.testing.assert_allclose([weighted[x] for x in sorted(valid)], [0.006, 0.150, 0.090], atol=1e-9)
    np.testing.assert_allclose([weighted[x] / 0.246 for x in sorted(valid)], [0.024, 0.610, 0.366], atol=5e-4)
    np.testing.assert_allclose([masked[x] for x in sorted(valid)], [0.667, 0.208, 0.125], atol=5e-4)


@given(st.integers(1, 400), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_draw_checks_no_token_twice_and_dies_where_nothing_is_ok(size, seed):
    generator = torch.Generator().manual_seed(seed)
    logs = torch.randn(1, size, generator=generator, dtype=torch.float64).log_softmax(-1)
    for estimate in (recursive, first):
        asked = []
        drawn = estimate(visits(logs, generator)[0], lambda token: asked.append(token) is not None)  # noqa: B023
        assert drawn == Draw(None, -math.inf, size) and sorted(asked) == list(range(size))
        drawn = estimate(visits(logs, generator)[0], lambda token: True)
        assert drawn.weight == 0 and drawn.checks <= 2
    again = Redraw(logs[0], visits(logs, generator)[0], generator)
    assert geometric(again, lambda token: False) == Draw(None, -math.inf, size)
    drawn = geometric(Redraw(logs[0], visits(logs, generator)[0], generator), lambda token: True)
    assert drawn.weight == 0 and drawn.checks <= 2


def test_what_has_no_probability_is_not_visited():
    logs = torch.full((1, 300), -math.inf, dtype=torch.float64)
    logs[0, [7, 200]] = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    assert sorted(token for token, _ in visits(logs)[0]) == [7, 200]


def test_the_order_is_that_of_sampling_without_replacement():
    logs = torch.tensor(P, dtype=torch.float64).log().expand(8000, -1)
    heads = [tuple(token for token, _ in itertools.islice(order, 2)) for order in visits(logs, torch.Generator().manual_seed(0))]
    for pair in itertools.permutations(range(5), 2):
        chance = P[pair[0]] * P[pair[1]] / (1 - P[pair[0]])
        assert heads.count(pair) / len(heads) == pytest.approx(chance, abs=4 * (chance / 8000) ** 0.5)


# --- with a model ----------------------------------------------------------------------------------------------------------
WORDS = Vocabulary((None, b"a", b"b", b"c", b"d"), frozenset([0]))
LANGUAGE = {"ab", "ba", "bb", "cab"}


def language(words=LANGUAGE):
    return predicate(lambda text: any(word.startswith(text) for word in words), lambda text: text in words, WORDS)


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama", sharpen=2.0, vocab_size=5)


PROMPT = {"input_ids": torch.tensor([[1, 2, 3, 4, 1]])}


def exact(model, words, sampling, local=False) -> dict[str, float]:
    """Probability of each word, by running the model on it; with ``local`` under masking at every step."""
    state, law = language(words).start, {}
    for word in sorted(words):
        tokens, here, total = ["abcd".index(c) + 1 for c in word], state, 1.0
        logits = model(input_ids=torch.cat([PROMPT["input_ids"], torch.tensor([tokens])], 1)).logits[0, 4:]
        for row, token in zip(sampling.law(logits.double()), [*tokens, 0], strict=True):
            allowed = torch.from_numpy(here.mask())
            total *= float(row[token] / (row[allowed].sum() if local else 1.0))
            here = here.after(token) if token else here
        law[word] = total
    return law if local else {word: value / sum(law.values()) for word, value in law.items()}


def texts(particles) -> dict[str, float]:
    return {"".join("abcd"[t - 1] for t in row[:-1]): mass for row, mass in particles.posterior.items()}


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=1.5, top_k=4)])
@pytest.mark.parametrize("recipe", [
    "awrs(particles=1200)", "awrs(particles=1200,ess_threshold=0,max_accepts=4)",
    "awrs(particles=1200,max_rejects=5,prune=false)", "masking(particles=1200,proper_weights=true)",
])  # fmt: skip
@torch.inference_mode()
def test_particles_follow_the_posterior(model, recipe, sampling):
    expected = exact(model, LANGUAGE, sampling)
    out = sample(model, PROMPT, language(), recipe, max_new_tokens=4, sampling=sampling, seed=3)
    found = texts(out)
    assert out.satisfied and set(found) <= LANGUAGE
    for word in LANGUAGE:
        assert found.get(word, 0.0) == pytest.approx(expected[word], abs=0.06)


@pytest.mark.parametrize("recipe", ["awrs(particles=1200,proper_weights=false)", "masking(particles=1200)"])
@torch.inference_mode()
def test_without_weights_particles_follow_masking(model, recipe):
    sampling = Sampling(temperature=1.0)
    expected, law = exact(model, LANGUAGE, sampling, local=True), exact(model, LANGUAGE, sampling)
    found = texts(sample(model, PROMPT, language(), recipe, max_new_tokens=4, sampling=sampling, seed=4))
    for word in LANGUAGE:
        assert found.get(word, 0.0) == pytest.approx(expected[word], abs=0.05)
    assert max(abs(expected[word] - law[word]) for word in LANGUAGE) > 0.1  # there is a bias to undo


@torch.inference_mode()
def test_the_evidence_is_the_probability_of_the_constraint(model):
    """Its mean over runs, without bias whatever is resampled; here also with a length that forces the end of some."""
    sampling = Sampling(temperature=1.0)
    words = {"ab", "ba", "bb", "b"}
    constraint = language(words)
    total = 0.0
    for word in words:
        tokens = ["abcd".index(c) + 1 for c in word]
        whole = torch.cat([PROMPT["input_ids"], torch.tensor([tokens])], 1)
        logits = model(input_ids=whole).logits[0, 4:].double()
        steps = zip(logits.log_softmax(-1), [*tokens, 0], strict=True)
        total += math.exp(sum(float(row[token]) for row, token in steps))
    run = {"max_new_tokens": 2, "sampling": sampling}
    runs = [math.exp(sample(model, PROMPT, constraint, "awrs(particles=40)", seed=s, **run).evidence) for s in range(40)]
    assert np.mean(runs) == pytest.approx(total, abs=4 * np.std(runs) / 40**0.5)


@torch.inference_mode()
def test_a_proposal_and_a_critic_change_the_way_and_the_target(model):
    sampling, other = Sampling(temperature=1.0), tiny.build("gpt_neox", sharpen=1.0, vocab_size=5, seed=4)
    expected = exact(model, LANGUAGE, sampling)
    run = {"max_new_tokens": 4, "sampling": sampling, "seed": 5}
    found = texts(sample(model, PROMPT, language(), "awrs(particles=2000)", proposal=other, **run))
    for word in LANGUAGE:
        assert found.get(word, 0.0) == pytest.approx(expected[word], abs=0.06)
    liked = {word: value * (5.0 if word.startswith("b") else 1.0) for word, value in expected.items()}

    def critic(ids):
        return math.log(5.0) if ids[0] == 2 else 0.0

    for threshold in (0, 0.7):
        out = sample(model, PROMPT, language(), f"awrs(particles=1200,ess_threshold={threshold})", critic=critic, **run)
        for word in LANGUAGE:
            assert texts(out).get(word, 0.0) == pytest.approx(liked[word] / sum(liked.values()), abs=0.06)


def test_caches_follow_their_particles():
    """Steps on selected rows give the logits of the texts alone."""
    small, inputs = tiny.shared("gpt_neox"), tiny.prompt(3, 12, pads=(0, 2, 5))
    from laconic.decoding.runner import Runner

    rows, tokens = torch.tensor([2, 0, 0, 2, 1]), torch.tensor([5, 6, 7, 8, 9])
    with torch.inference_mode(), apply(small, "dense") as handle:
        runner = Runner(handle)
        runner.prefill(inputs)
        twin = runner.branch(rows)
        one = twin.step(tokens).logits
        runner.select(rows)
        two = runner.step(tokens).logits
        assert (twin.forwards, runner.forwards) == (1, 2)
        for row, (source, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            ids = torch.cat([inputs["input_ids"][source, inputs["attention_mask"][source] > 0], torch.tensor([token])])[None]
            alone = small(input_ids=ids, use_cache=False).logits[0, -1]
            torch.testing.assert_close(one[row, -1], alone)
            torch.testing.assert_close(two[row, -1], alone)


@pytest.mark.parametrize("recipe", ["awrs(particles=6)", "masking(particles=6)", "awrs(particles=6) + streaming(recent=4):24"])
def test_every_text_satisfies_the_constraint_or_has_no_weight(recipe):
    digits = Vocabulary((None, None, *(bytes([code]) for code in range(32, 127))), frozenset([1]))

    def prefix(text):
        return len(text) <= 6 and (not text or (text.isdecimal() and text[0] != "0"))

    constraint = predicate(prefix, lambda text: text != "" and prefix(text) and int(text) % 3 == 0, digits)
    for name in ("llama", "gpt_neox"):
        for limit in (3, 8):
            out = sample(tiny.shared(name), tiny.prompt(1, 30), constraint, recipe, max_new_tokens=limit, seed=2)
            for row, weight in zip(out.rows, out.log_weights.tolist(), strict=True):
                assert weight == -math.inf or (constraint.accepts(row) and row[-1] == 1 and len(row) <= limit + 1)
            assert sum(out.weights.tolist()) == pytest.approx(float(out.satisfied))
            assert out.best is None or constraint.accepts(out.best)


def test_a_run_in_which_all_fail_says_so(model):
    hopeless = predicate(lambda text: len(text) <= 9, lambda text: len(text) == 9, WORDS)
    out = sample(model, PROMPT, hopeless, "awrs(particles=4)", max_new_tokens=3)
    assert not out.satisfied and out.best is None and out.posterior == {} and out.evidence == -math.inf
    assert out.weights.tolist() == [0.0] * 4


@pytest.mark.parametrize(("change", "reason"), [
    ({"recipe": "awrs + token_recycling:8"}, "no method that drafts"), ({"recipe": "dense"}, "one of awrs and masking"),
    ({"recipe": "awrs + masking"}, "one of awrs and masking"), ({"sampling": Sampling()}, "temperature above 0"),
    ({"recipe": "awrs(max_rejects=1)"}, "give 2 or more"), ({"recipe": "awrs + adadec(threshold=1)"}, "leave adadec out"),
    ({"inputs": tiny.prompt(2, 5)}, "single prompt"), ({"constraint": language({"é"})}, "cannot be satisfied"),
])  # fmt: skip
def test_what_cannot_work_is_one_sentence(model, change, reason):
    with pytest.raises(LaconicError, match=reason):
        sample(**{"model": model, "inputs": PROMPT, "constraint": language(), **change})


def test_decode_points_to_the_loop_that_runs_it(model):
    with pytest.raises(LaconicError, match=r"laconic.decoding.particles.sample"):
        decode(model, PROMPT, "awrs")
