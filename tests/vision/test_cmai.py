"""CMAI: the attention of words to pictures, against whole maps of the stock model and its own definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import vlm
from test_entry import split

import laconic
from laconic.layers import decoder_layers

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "gemma3", "paligemma")


def first_layer(family: str, recipe: str, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer's attention puts out, ``(n, heads, head_dim)``, and its values ``(kv_heads, n, head_dim)``."""
    model, got = vlm.build(family), {}
    attention = decoder_layers(model)[0].self_attn
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        hook = attention.o_proj.register_forward_pre_hook(lambda m, args: got.__setitem__("out", args[0][0]))
        model(**x)
        hook.remove()
        return got["out"].unflatten(-1, (4, -1)), handle.latest.layers[0].values[0]


@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_words_lose_the_columns_of_lowest_focus_and_nothing_else_changes(family: str, share: float) -> None:
    x = vlm.inputs(family, (1 if family == "gemma3" else 2,))  # whose cache is to hold what is behind its window too
    dense = vlm.maps(family, x)[0][0]
    with laconic.apply(vlm.build(family), "cmai") as handle, torch.no_grad():
        vlm.build(family)(**x)
        marks = torch.cat([picture.layout.separators for picture in handle.entry.pictures])
    shows = (x["input_ids"][0] == vlm.IMAGE).nonzero()[:, 0]
    pictured, words = shows[~marks].tolist(), (x["input_ids"][0] != vlm.IMAGE).nonzero()[:, 0].tolist()
    mean, expected = dense.mean(0), dense.clone()
    read = mean[words][:, words] / mean[words][:, words].sum(-1, keepdim=True)
    focus = read @ mean[words][:, pictured]
    for i, word in enumerate(words):
        visible = [c for c, p in enumerate(pictured) if float(dense[0, word, p]) > 0]
        order = sorted(visible, key=lambda c, i=i: (round(float(focus[i, c]), 9), c))
        for c in order[: max(0, min(int(share * len(visible) + 1e-6), len(visible) - 1))]:
            expected[:, word, pictured[c]] = 0.0
    expected = expected / expected.sum(-1, keepdim=True)
    assert int((expected != dense).any(0).any(-1).sum()) > 5
    touched = ((expected == 0) & (dense > 0)).any(0).nonzero()
    assert set(touched[:, 0].tolist()) <= set(words) and set(touched[:, 1].tolist()) <= set(pictured)
    found, values = first_layer(family, f"cmai(inhibit={share}, since=0)", x)
    torch.testing.assert_close(expected.sum(-1), torch.ones_like(expected[..., 0]))
    by_hand = expected @ values.repeat_interleave(len(expected) // len(values), 0)
    torch.testing.assert_close(found, by_hand.movedim(0, 1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_word_that_is_written_looks_where_it_would_as_a_word_of_the_prompt(family: str) -> None:
    model, x = vlm.build(family), vlm.inputs(family, (2, 1))
    with laconic.apply(model, "cmai(since=0.2)"), torch.no_grad():
        options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [vlm.IMAGE, vlm.VIDEO, vlm.START, vlm.END]}
        out = model.generate(**x, **options, return_dict_in_generate=True, output_logits=True)
        more = {**x, "input_ids": out.sequences, "attention_mask": torch.nn.functional.pad(x["attention_mask"], (0, 6), value=1)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in more:
                more[name] = torch.nn.functional.pad(x[name], (0, 6))
        whole = model(**more).logits[:, -7:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3"])
def test_a_padded_row_is_the_row_alone(family: str) -> None:
    model, x = vlm.build(family), vlm.inputs(family, (2, 1))
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with laconic.apply(model, "cmai(since=0)"), torch.no_grad():
        together = model.generate(**x, **options).logits
        for row, alone in enumerate(split(family, x, (2, 1))):
            for one, all_ in zip(model.generate(**alone, **options).logits, together, strict=True):
                torch.testing.assert_close(one[0], all_[row], atol=1e-3, rtol=1e-3)


def write(x: dict[str, torch.Tensor], recipe: str, **options: Any) -> torch.Tensor:
    model = vlm.build("llava")
    with laconic.apply(model, recipe), torch.no_grad():
        out = model.generate(**x, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **options)
    return torch.stack(out.logits)


def test_nothing_inhibited_is_dense_and_a_text_is_left_alone() -> None:
    x, words = vlm.inputs("llava", (1, 2)), vlm.inputs("llava", (0, 0))
    dense = write(x, "dense")
    assert torch.equal(write(x, "cmai(inhibit=0)"), dense)
    torch.testing.assert_close(write(x, "cmai(inhibit=0.001, since=0)"), dense, atol=1e-4, rtol=1e-4)  # rounds to no token
    assert torch.equal(write(words, "cmai(since=0)"), write(words, "dense"))
    assert not torch.allclose(write(x, "cmai"), dense, atol=1e-3)


OTHERS = ("divprune:30%", "fastv(layers=1):30%", "snapkv(window=4):20", "adakv(of=snapkv(window=4), recent=4):30")


@pytest.mark.parametrize("other", OTHERS)
def test_composes_with_what_drops_tokens(other: str) -> None:
    x = vlm.inputs("llava", (1, 2))
    plain, inhibited = write(x, other), write(x, f"{other} + cmai(since=0)")
    assert bool(inhibited.isfinite().all()) and not torch.allclose(plain, inhibited, atol=1e-3)
    torch.testing.assert_close(write(x, f"{other} + cmai(inhibit=0.001, since=0)"), plain, atol=2e-4, rtol=2e-4)
    assert bool(write(x, f"{other} + cmai(since=0)", num_beams=3).isfinite().all())


def test_a_later_turn_with_another_picture_is_as_if_all_had_been_asked_at_once() -> None:
    model = vlm.build("llava")
    first, second = vlm.inputs("llava", (1,)), vlm.inputs("llava", (1,), seed=1)
    turns = [{name: x[name] for name in ("input_ids", "pixel_values")} for x in (first, second)]
    both = {name: torch.cat([x[name] for x in turns], dim=int(name == "input_ids")) for name in turns[0]}
    with laconic.apply(model, "cmai(since=0)"), torch.no_grad():
        whole = model(**both).logits[:, -1]
        cache = model(**turns[0], use_cache=True).past_key_values
        torch.testing.assert_close(model(**turns[1], cache=cache).logits[:, -1], whole, atol=1e-3, rtol=1e-3)


def remembered(cache: Any) -> list[torch.Tensor]:
    """What the layers know of words and pictures."""
    return [value.tensor for layer in cache.layers for name, value in layer.memory.items() if name.startswith("cmai.")]


def test_a_step_leaves_what_was_remembered_before_as_it_was() -> None:
    model, x = vlm.build("llava"), vlm.inputs("llava", (1,))
    after, logits = x["input_ids"].shape[1], []
    with laconic.apply(model, "cmai(since=0)"), torch.no_grad():
        cache = model(**x, use_cache=True).past_key_values
        states = [layer.state() for layer in cache.layers]  # as a draft's branches hold on to them
        held = remembered(cache)
        before = [tensor.clone() for tensor in held]
        more = torch.ones(1, after + 1, dtype=torch.int64)
        for word in (7, 8, 7):
            logits.append(model(input_ids=torch.tensor([[word]]), cache=cache, attention_mask=more).logits)
            assert held and all(torch.equal(tensor, was) for tensor, was in zip(held, before, strict=True))
            cache.crop(-1)
            for layer, state in zip(cache.layers, states, strict=True):
                layer.set_state(state)
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])


def test_gradients_pass_the_choice_and_are_not_remembered() -> None:
    model, x = copy.deepcopy(vlm.build("llava")), vlm.inputs("llava", (1,))
    weight = decoder_layers(model)[0].self_attn.q_proj.weight

    def loss() -> torch.Tensor:
        return model(**x, use_cache=True).logits[:, -1].logsumexp(-1).sum()

    with laconic.apply(model, "cmai(since=0)") as handle:
        (slope,) = torch.autograd.grad(loss(), weight)
        assert remembered(handle.latest) and not any(tensor.requires_grad for tensor in remembered(handle.latest))
        ends, step = [], 0.05 * slope / slope.norm()
        for change in (step, -2 * step):
            with torch.no_grad():
                weight.add_(change)
                ends.append(float(loss()))
    assert ends[0] - ends[1] == pytest.approx(0.1 * float(slope.norm()), rel=0.05)


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(laconic.LaconicError, match="no budget"):
        laconic.get("cmai", budget="10%")
    with pytest.raises(laconic.LaconicError, match="at most 1"):
        laconic.get("cmai", inhibit=1.5)
    with pytest.raises(laconic.LaconicError, match="attends in its own way"):
        laconic.apply(vlm.build("llava"), "cmai + tokenselect:16")
