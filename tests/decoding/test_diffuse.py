"""Decoding of masked-diffusion models, against plain forwards of the model and against stock caches."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusion import MASK, full_logits, make, one_per_step, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build
from transformers import DynamicCache

import laconic
from laconic import LaconicError
from laconic.decoding.canvas import Run
from laconic.decoding.diffuse import diffuse

NEW = 14


@pytest.fixture(scope="module")
def model():
    return make()


def positions(*bounds: int) -> torch.Tensor:
    return torch.arange(*bounds)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_forward_over_the_canvas_is_the_models_own_with_full_attention(name, attention):
    model = make(name, attn_implementation=attention)
    run = Run(model, prompt(), NEW)
    with torch.inference_mode():
        seen = run.predict(positions(run.length), slice(0, run.length), positions(12, 18))
    torch.testing.assert_close(seen.logits, full_logits(model, run.ids)[:, 12:18], rtol=1e-4, atol=1e-4)
    assert (run.forwards, run.rows) == (1, run.length)


def test_a_model_that_predicts_the_next_token_is_read_one_position_earlier(model):
    shifted = copy.deepcopy(model)
    shifted.config.diffusion_shift = True
    run = Run(shifted, prompt(), NEW)
    with torch.inference_mode():
        seen = run.predict(positions(run.length), slice(0, run.length), positions(9, 15))
        torch.testing.assert_close(seen.logits, full_logits(model, run.ids)[:, 8:14], rtol=1e-4, atol=1e-4)
        part = run.predict(positions(12, 15), slice(0, run.length), positions(12, 15))
        torch.testing.assert_close(part.logits, seen.logits[:, 3:], rtol=1e-4, atol=1e-4)
    assert run.rows == run.length + 4, "the position before the first one is computed, too"


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("block", [4, 32])
def test_full_canvas_is_one_token_per_step(name, block):
    model = make(name)
    out = diffuse(model, prompt(), f"full_canvas(block={block})", max_new_tokens=NEW)
    assert torch.equal(out.ids, one_per_step(model, prompt(), NEW, block))
    assert (out.forwards, out.rows, out.tokens_per_forward) == (NEW, NEW * (9 + NEW), 1.0)


def test_several_per_step_take_as_many_fewer_steps(model):
    assert diffuse(model, prompt(), "full_canvas(per_step=4)", max_new_tokens=NEW).forwards == 4


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["fast_dllm(threshold={})", "local_leap(threshold={}, relaxed={})"]))
def test_thresholds_above_one_leave_one_token_per_step(seed, method):
    model, ids = make(), prompt(seed=seed)
    out = diffuse(model, ids, method.format(2, 2), max_new_tokens=10)
    assert torch.equal(out.ids, one_per_step(model, ids, 10, 32)) and out.forwards == 10


def test_local_leap_without_its_leap_is_fast_dllm(model):
    fast = diffuse(model, prompt(), "fast_dllm(threshold=0.6)", max_new_tokens=NEW)
    assert fast.forwards < NEW, "or the test says nothing"
    for method in ("local_leap(threshold=0.6, relaxed=0.3, width=0)", "local_leap(threshold=0.6, relaxed=0.6)"):
        leap = diffuse(model, prompt(), method, max_new_tokens=NEW)
        assert torch.equal(leap.ids, fast.ids) and leap.steps == fast.steps
    assert diffuse(model, prompt(), "local_leap(threshold=0.6, relaxed=0.3)", max_new_tokens=NEW).forwards < fast.forwards


def by_stock_cache(model, canvas: torch.Tensor, before: torch.Tensor, span: tuple[int, int], plan: str) -> torch.Tensor:
    """Logits of the block with keys and values of ``before`` outside of what the plan computes anew."""
    start, stop = span
    last = stop if plan == "dual" else canvas.shape[1]
    cache, size = DynamicCache(config=model.config), canvas.shape[1]
    with torch.inference_mode():
        model(input_ids=before, attention_mask=torch.zeros(1, 1, size, size), cache=cache, use_cache=True)
        for layer in cache.layers:  # attention does not mind the order of the keys
            outside = torch.cat([positions(start), positions(last, size)])
            layer.keys, layer.values = layer.keys[:, :, outside], layer.values[:, :, outside]
        logits = model(
            input_ids=canvas[:, start:last], position_ids=positions(start, last)[None], cache=cache, use_cache=True,
            attention_mask=torch.zeros(1, 1, last - start, size),
        ).logits[:, : stop - start]  # fmt: skip
        logits[..., MASK] = -torch.inf
    return logits


@pytest.mark.parametrize("plan", ["prefix", "dual"])
def test_cached_plans_commit_what_a_stock_cache_says(plan, model):
    canvases: list[torch.Tensor] = []
    out = diffuse(
        model, prompt(), f"fast_dllm(threshold=2, plan={plan}, block=6)", max_new_tokens=NEW,
        on_step=lambda step, ids: canvases.append(torch.cat([prompt(), ids], 1).clone()),
    )  # fmt: skip
    blank = torch.cat([prompt(), torch.full((1, NEW), MASK)], 1)
    for number, (before, after) in enumerate(zip([blank, *canvases], canvases, strict=False)):
        start = 9 + number // 6 * 6
        stop, fresh = min(start + 6, 9 + NEW), [blank, *canvases][number // 6 * 6]
        logits = by_stock_cache(model, before, fresh, (start, stop), plan)
        if number % 6 == 0:
            logits = full_logits(model, before)[:, start:stop]
        sure, token = logits[0].softmax(-1).max(-1)
        best = int(sure.masked_fill(before[0, start:stop] != MASK, -1).argmax())
        assert out.steps[number].positions == [[start - 9 + best]] and out.steps[number].tokens == [[int(token[best])]]
        assert int(after[0, start + best]) == int(token[best])


@pytest.mark.parametrize(("plan", "rows"), [("none", [20, 20, 20, 20]), ("prefix", [20, 8, 20, 4]), ("dual", [20, 4, 20, 4])])
def test_a_plan_computes_what_it_says(plan, rows, model):
    out = diffuse(model, prompt(12), f"full_canvas(per_step=2, block=4, plan={plan})", max_new_tokens=8)
    assert [step.rows for step in out.steps] == rows and out.rows == sum(rows)


@pytest.mark.parametrize(
    "method",
    ["full_canvas(block=4)", "fast_dllm(threshold=0.6, plan=dual, block=6)", "local_leap(threshold=0.6, relaxed=0.4)"],
)
def test_rows_of_a_batch_are_what_they_are_alone(method, model):
    model = copy.deepcopy(model).double()  # near ties would flip with the rounding
    short, long = prompt(5, seed=1), prompt(9, seed=2)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    both = diffuse(model, ids, method, max_new_tokens=NEW, attention_mask=mask)
    for row, alone in enumerate((short, long)):
        assert torch.equal(both.ids[row : row + 1], diffuse(model, alone, method, max_new_tokens=NEW).ids)


def test_the_record_of_the_steps_tells_the_whole_story(model):
    shown = []
    out = diffuse(
        model, prompt(), "local_leap(threshold=0.6, relaxed=0.3, block=6)", max_new_tokens=NEW,
        on_step=lambda step, ids: shown.append((step, ids.clone())),
    )  # fmt: skip
    canvas = torch.full((NEW,), MASK)
    for step, ids in shown:
        assert bool((canvas[step.positions[0]] == MASK).all()), "what is committed stays"
        canvas[step.positions[0]] = torch.tensor(step.tokens[0])
        assert torch.equal(ids[0], canvas)
        assert step.done == [int((canvas == MASK).int().argmax()) if bool((canvas == MASK).any()) else NEW]
    assert torch.equal(canvas, out.ids[0]) and [step for step, _ in shown] == out.steps
    assert sum(step.rows for step in out.steps) == out.rows and len(out.steps) == out.forwards


def test_a_block_that_ends_the_text_is_the_last():
    free = diffuse(make(), prompt(), "full_canvas(block=4)", max_new_tokens=20)
    end = int(free.ids[0, 5])
    first = free.ids[0].tolist().index(end)
    model = make(end=end)
    out = diffuse(model, prompt(), "full_canvas(block=4)", max_new_tokens=20)
    assert out.forwards == (first // 4 + 1) * 4 < free.forwards
    assert out.lengths == [first + 1] and out.ids.tolist() == [free.ids[0, : first + 1].tolist()]
    whole = diffuse(model, prompt(), "full_canvas(block=4, early_stop=false)", max_new_tokens=20)
    assert whole.forwards == free.forwards and torch.equal(whole.ids, out.ids)


def test_a_row_that_has_ended_is_filled_with_its_end():
    ids = torch.cat([prompt(seed=1), prompt(seed=2)])
    alone = [diffuse(make(), ids[i : i + 1], "full_canvas(block=4)", max_new_tokens=12).ids[0].tolist() for i in range(2)]
    end = next(token for token in alone[0][:6] if token not in alone[1])
    out = diffuse(make(end=end), ids, "full_canvas(block=4)", max_new_tokens=12)
    first = alone[0].index(end)
    assert out.lengths == [first + 1, 12]
    assert out.ids[0].tolist() == alone[0][: first + 1] + [end] * (11 - first) and out.ids[1].tolist() == alone[1]


def test_sampling_is_repeatable_and_differs_from_greedy(model):
    def run(seed):
        return diffuse(
            model, prompt(), max_new_tokens=NEW, temperature=1.5, generator=torch.Generator().manual_seed(seed)
        ).ids

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not bool((run(0) == MASK).any())


def test_masks_in_the_prompt_stay(model):
    ids = prompt()
    ids[0, 3] = MASK
    assert diffuse(model, ids, max_new_tokens=4).forwards == 4


def test_bfloat16(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    out = diffuse(half, prompt(), "fast_dllm(plan=dual)", max_new_tokens=NEW)
    assert out.ids.shape == (1, NEW) and not bool((out.ids == MASK).any())


def test_what_cannot_work_is_one_sentence(model):
    def refused(sentence, model=model, ids=None, method="full_canvas", **options):
        with pytest.raises(LaconicError, match=sentence):
            diffuse(model, prompt() if ids is None else ids, method, **{"max_new_tokens": 4, **options})

    plain = build()
    refused("is no diffusion model: give one such as the built-in 'mask'", plain)
    refused("needs a model that fills in masks with full attention.* this one is 'causal'", make(kind="causal"))
    refused("needs a model that fills in masks with causal attention.* this one is 'masked'", method="wedlm")
    refused("'snapkv' does not decode a diffusion model", method="snapkv")
    refused("does not decode", method="full_canvas + local_leap")
    refused("at least one token", ids=prompt()[:, :0])
    refused("max_new_tokens is 0", max_new_tokens=0)
    refused("lower max_new_tokens to 503", max_new_tokens=600)
    refused("temperature is -1", temperature=-1)
    refused("one prompt at a time", ids=prompt().expand(2, -1), method="window_diffusion")
    refused("mask does not fit", attention_mask=torch.tensor([[1] * 8 + [0]]))
    refused("takes no padding", attention_mask=torch.tensor([[0] + [1] * 8]), method="window_diffusion")
    refused("there is no plan 'some'", method="fast_dllm(plan=some)")
    refused("relaxed=0.95 exceeds threshold=0.9", method="local_leap(relaxed=0.95)")
    causal = make(kind="causal")
    with laconic.apply(causal, "snapkv:8"):
        refused("outside of laconic.apply", causal, method="wedlm")
    with pytest.raises(LaconicError, match=r"fills in masks .* use laconic\.generate"):
        laconic.apply(model, "snapkv:8")


def test_diffusion_gemma_is_sent_to_its_own_generate():
    from transformers import DiffusionGemmaForBlockDiffusion

    with pytest.raises(LaconicError, match="no masks to commit: use its own generate"):
        diffuse(DiffusionGemmaForBlockDiffusion.__new__(DiffusionGemmaForBlockDiffusion), prompt())


def test_apply_says_where_these_methods_belong(model):
    with pytest.raises(LaconicError, match=r"local_leap decides how text is written.* laconic\.generate"):
        laconic.apply(model, "local_leap")
