from __future__ import annotations

import pytest
import torch
from diffusion import MASK, make, one_per_step, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from laconic import LaconicError
from laconic.decoding.canvas import Run
from laconic.decoding.diffuse import diffuse
from laconic.registry import get

NEW = 24


@pytest.fixture(scope="module")
def model():
    return make()


class Watched(Run):
    """Notes what every forward computed, attended to and scored, and the keys that it found."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.calls = []

    def predict(self, compute, attend, score):
        layer = self.cache.layers[-1]
        keys = layer.keys.clone() if layer.is_initialized else None
        self.calls.append((compute, torch.arange(self.length)[attend], score, keys, self.open[0].clone()))
        return super().predict(compute, attend, score)


def watch(model, method, ids=None, new=NEW):
    run = Watched(model, prompt() if ids is None else ids, new)
    with torch.inference_mode():
        get("window_diffusion", **method).decode(run)
    return run


@pytest.mark.parametrize("scope", ["window", "canvas"])
@pytest.mark.parametrize("seed", [0, 1])
def test_refreshing_always_with_a_wide_window_is_dense(scope, seed, model):
    ids = prompt(seed=seed)
    out = diffuse(model, ids, get("window_diffusion", window=64, active=64, refresh=1, scope=scope), max_new_tokens=NEW)
    assert torch.equal(out.ids, one_per_step(model, ids, NEW, NEW))
    assert out.forwards == NEW


@settings(max_examples=15, deadline=None)
@given(
    st.integers(3, 8), st.integers(1, 9), st.integers(0, 10), st.integers(1, 3), st.sampled_from(["window", "canvas"]),
    st.booleans(),
)
def test_a_step_computes_the_active_positions_and_commits_among_them(active, refresh, spare, per_step, scope, linger):
    window = active + per_step * max(0, refresh - 2) + spare
    run = watch(
        make(),
        {"window": window, "active": active, "refresh": refresh, "per_step": per_step, "scope": scope, "linger": linger},
    )
    assert not bool(run.open.any()) and sum(step.rows for step in run.steps) == run.rows
    for number, ((compute, attend, score, _, open_), step) in enumerate(zip(run.calls, run.steps, strict=True)):
        masks = open_.nonzero()[:, 0]
        assert set(compute.tolist()) <= set(attend.tolist()), "a token attends to its own key"
        assert {9 + p for p in step.positions[0]} <= set(score.tolist()) <= set(compute.tolist())
        assert len(step.positions[0]) == min(per_step, len(masks))
        if number % refresh:
            assert score.tolist() == masks[:active].tolist()
            settled = run.length - 9 - len(masks)
            assert step.rows == len(compute) <= len(score) + min(settled, per_step * (number % refresh))
        else:
            wanted = masks if scope == "canvas" else masks[: window + per_step]
            assert score.tolist() == wanted.tolist()
            assert len(compute) == run.length - len(masks) + len(wanted)


@pytest.mark.parametrize(("linger", "rows"), [(True, [9 + 8, 4 + 1, 4 + 2, 4 + 3]), (False, [9 + 8, 4 + 1, 4 + 1, 4 + 2])])
def test_rows_of_a_phase(linger, rows, model):
    """Prompt, window and room for the refresh's own commit; then 4 masks, and what was decoded in the phase."""
    run = watch(model, {"window": 7, "active": 4, "refresh": 4, "linger": linger})
    assert [step.rows for step in run.steps[:4]] == rows


def test_keys_of_untouched_positions_stay_for_a_phase_and_the_far_ones_do_not_exist(model):
    run = watch(model, {"window": 8, "active": 3, "refresh": 6, "linger": False})
    for number in range(1, len(run.calls)):
        _, attend, _, keys, _ = run.calls[number]
        if number % 6 > 1:
            moved = set(run.calls[number - 1][0].tolist())
            before = run.calls[number - 1][3]
            still = [p for p in attend.tolist() if p not in moved]
            assert torch.equal(keys[:, :, still], before[:, :, still]), "bit by bit"
            assert attend.tolist() == run.calls[number - 1][1].tolist(), "the window is fixed"
        assert len(attend) <= 9 + NEW and (number % 6 == 0 or attend.max() < run.length)
    first = run.calls[1][1]
    assert len(first) == 9 + 1 + 8, "prompt, the refresh's own commit, and the window; nothing behind it"


@torch.inference_mode()
def test_a_step_in_a_phase_is_a_forward_with_the_keys_of_the_refresh(model):
    """Against a stock cache that holds the prompt as it was computed with an empty canvas, and a forward over the rest."""
    run = watch(model, {"window": 65, "active": 64, "refresh": 3})
    canvas = torch.cat([prompt(), torch.full((1, NEW), MASK)], 1)
    cache, size = DynamicCache(config=model.config), canvas.shape[1]
    model(input_ids=canvas, attention_mask=torch.zeros(1, 1, size, size), cache=cache, use_cache=True)
    for step, following in zip(run.steps[:2], run.steps[1:3], strict=True):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :9], layer.values[:, :, :9]
        canvas[0, 9 + step.positions[0][0]] = step.tokens[0][0]
        logits = model(
            input_ids=canvas[:, 9:], position_ids=torch.arange(9, size)[None], cache=cache, use_cache=True,
            attention_mask=torch.zeros(1, 1, NEW, size),
        ).logits[0]  # fmt: skip
        logits[:, MASK] = -torch.inf
        sure, token = logits.softmax(-1).max(-1)
        best = int(sure.masked_fill(canvas[0, 9:] != MASK, -1).argmax())
        assert following.positions == [[best]] and following.tokens == [[int(token[best])]]


def test_the_bound_of_the_window():
    get("window_diffusion", window=46, active=16, refresh=32)
    with pytest.raises(LaconicError, match="give window=46 or more"):
        get("window_diffusion", window=45, active=16, refresh=32)
    get("window_diffusion", window=1, active=16, refresh=1)
    for wrong in ({"score": "luck"}, {"scope": "all"}):
        with pytest.raises(LaconicError, match="there is no"):
            get("window_diffusion", **wrong)


def test_the_canvas_ends_behind_an_end_token():
    method = get("window_diffusion", window=16, active=4, refresh=4)
    free = diffuse(make(), prompt(), method, max_new_tokens=NEW)
    end = int(free.ids[0, 6])
    out = diffuse(make(end=end), prompt(), method, max_new_tokens=NEW)
    assert out.lengths == [out.ids[0].tolist().index(end) + 1] and out.lengths[0] <= 7
    assert out.rows < free.rows and out.forwards < free.forwards
    method = get("window_diffusion", window=16, active=4, refresh=4, early_stop=False)
    whole = diffuse(make(end=end), prompt(), method, max_new_tokens=NEW)
    assert whole.forwards == NEW


def test_entropy_chooses_other_positions(model):
    scores = ("probability", "entropy")
    outs = [diffuse(model, prompt(), get("window_diffusion", score=score), max_new_tokens=NEW) for score in scores]
    assert [step.positions for step in outs[0].steps] != [step.positions for step in outs[1].steps]
