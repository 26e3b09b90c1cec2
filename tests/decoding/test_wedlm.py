from __future__ import annotations

import pytest
import torch
from diffusion import MASK, make, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.decoding.canvas import Run
from laconic.decoding.diffuse import diffuse
from laconic.decoding.positions import negative_entropy
from laconic.registry import get

NEW = 20


@pytest.fixture(scope="module")
def model():
    return make(kind="causal")


@torch.inference_mode()
def check_cache(model, run, done):
    """The cached keys of ``done`` positions are those of a fresh causal prefill of the same ids."""
    fresh = model(input_ids=run.ids[:, :done], use_cache=True).cache
    for ours, theirs in zip(run.cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, :done], theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values[:, :, :done], theirs.values, rtol=1e-4, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 16), st.sampled_from([0.0, 0.5, 1.5, 3.0]), st.integers(0, 100), st.sampled_from(["llama", "qwen3"]))
def test_the_cache_is_that_of_a_causal_prefill(window, entropy, seed, name):
    model = make(name, kind="causal")
    run, method = Run(model, prompt(seed=seed), NEW), get("wedlm", window=window, entropy=entropy)
    sizes = []
    with torch.inference_mode():
        place = torch.arange(run.start)
        run.forward(run.ids[:, place], place, write=place, read=slice(0, 9), bias=None, keep=place[:0])
        done = run.start
        while done is not None:
            check_cache(model, run, done)
            masked, rows = int(run.open.sum()), run.rows
            done = method.advance(run, done)
            sizes.append(run.rows - rows)
            assert int(run.open.sum()) < masked, "every step fills at least one"
    assert not bool(run.open.any()) and max(sizes) <= 2 * window


def test_one_mask_at_a_time_is_left_to_right(model):
    out = diffuse(model, prompt(), "wedlm(window=1, entropy=0)", max_new_tokens=NEW)
    assert out.forwards == NEW + 1, "the prefill, and one per token"
    assert [step.positions for step in out.steps] == [[[i]] for i in range(NEW)]
    assert [step.rows for step in out.steps] == [9 + 1] + [2] * (NEW - 1)


@torch.inference_mode()
def test_it_equals_forwards_without_a_cache_and_without_reordering(model):
    """Logits do not depend on the order of the rows when the mask says who sees whom: all known tokens, and masks to the left."""
    steps = []
    diffuse(
        model, prompt(), "wedlm(window=6, entropy=1.0)", max_new_tokens=NEW,
        on_step=lambda step, ids: steps.append((step, ids.clone())),
    )  # fmt: skip
    before, done = torch.full((1, NEW), MASK), 0
    for number, (step, after) in enumerate(steps):
        known = (before[0] != MASK).tolist()
        front = known.index(False)
        length = 9 + min(done + (front - done) + 6, NEW)
        ids = torch.cat([prompt(), before], 1)[:, :length]
        known = [True] * 9 + known[: length - 9]
        seen = torch.tensor([[j <= i if known[i] == known[j] else known[j] for j in range(length)] for i in range(length)])
        bias = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        logits = model(input_ids=ids, attention_mask=bias, use_cache=False).logits[0]
        logits[:, MASK] = -torch.inf
        masks = [i for i in range(length) if not known[i]]
        price = -negative_entropy(logits[masks]) + 0.02 * torch.tensor([float(i - masks[0]) for i in masks])
        chosen = [masks[i] for i in range(len(masks)) if price[i] <= 1.0] or [masks[int(price.argmin())]]
        assert [9 + p for p in step.positions[0]] == chosen, number
        assert step.tokens[0] == logits[chosen].argmax(-1).tolist()
        before, done = after, front
    assert len(steps) < NEW, "or nothing was decoded in parallel"


def test_text_ends_at_an_end_token_that_nothing_masked_precedes():
    free = diffuse(make(kind="causal"), prompt(), "wedlm(window=4)", max_new_tokens=NEW)
    end = int(free.ids[0, 8])
    first = free.ids[0].tolist().index(end)
    out = diffuse(make(kind="causal", end=end), prompt(), "wedlm(window=4)", max_new_tokens=NEW)
    assert out.lengths == [first + 1] and torch.equal(out.ids, free.ids[:, : first + 1])
    assert out.forwards < free.forwards


def test_a_higher_entropy_needs_fewer_forwards_in_the_first_step(model):
    counts = [
        len(diffuse(model, prompt(), get("wedlm", entropy=entropy, distance=0.0), max_new_tokens=NEW).steps[0].positions[0])
        for entropy in (0.0, 0.5, 1.0, 2.0, 9.0)
    ]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 16


def test_a_contiguous_run_leaves_no_holes(model):
    out = diffuse(model, prompt(), "wedlm(entropy=1.5, contiguous=true)", max_new_tokens=NEW)
    assert [p for step in out.steps for p in step.positions[0]] == list(range(NEW)) and out.forwards < NEW
    holes = diffuse(model, prompt(), "wedlm(entropy=1.5)", max_new_tokens=NEW)
    assert [p for step in holes.steps for p in step.positions[0]] != list(range(NEW))
