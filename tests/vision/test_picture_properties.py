"""What every method that drops picture tokens must keep to, generated from the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vlm
from test_entry import split

import laconic
from laconic import registry
from laconic.profiles import weights_to_json
from laconic.vision.base import VisionMethod
from laconic.vision.inside import InsideMethod
from laconic.vision.student import RelevanceStudent

DROPPING = [row["id"] for row in laconic.methods() if row["stage"] == "vision" and "drop" in row["verbs"]]
METHODS = {name: registry.find(name) for name in DROPPING}
BEFORE = [name for name, cls in METHODS.items() if issubclass(cls, VisionMethod)]
INSIDE = [name for name, cls in METHODS.items() if issubclass(cls, InsideMethod)]
SIZED = [name for name, cls in METHODS.items() if cls.takes_budget]
UNSIZED = {"withdraw": "threshold=1", "adatoken3d": "lost=0.4, floor=0"}  # settings that drop something
FAMILIES = ("llava", "llava_siglip", "llava_next", "qwen2_5_vl", "gemma3")


@pytest.fixture(autouse=True)
def profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What methods need to know of a model: a trend, and the weights of a student."""
    torch.manual_seed(0)
    tables = {"slope": [0.7] * 4, "height": [1.0] * 4, "weights": weights_to_json(RelevanceStudent())}
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: tables)


def prepared(name: str, family: str) -> Any:
    """The model, unless the method says in a sentence that it cannot work there."""
    model = vlm.build(family)
    try:
        laconic.apply(model, recipe(name, "50%")).remove()
    except laconic.LaconicError as error:
        assert "class token" in str(error)
        pytest.skip(str(error))
    return model


def recipe(name: str, budget: str) -> str:
    return f"{name}:{budget}" if METHODS[name].takes_budget else f"{name}({UNSIZED[name]})"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SIZED)
def test_the_full_budget_is_dense(name: str, family: str) -> None:
    model, x = prepared(name, family), vlm.inputs(family, (1, 2))
    real = x["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**x).logits[real]
        with laconic.apply(model, f"{name}:100%"):
            torch.testing.assert_close(model(**x).logits[real], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("budget", ["1", "7", "40%"])
def test_exactly_the_budget_stays_of_every_picture(name: str, family: str, budget: str) -> None:
    model, x = prepared(name, family), vlm.inputs(family, (1, 2))
    with laconic.apply(model, f"{name}:{budget}") as handle, torch.no_grad():
        model(**x)
        assert len(handle.entry.pictures) == 3
        for picture, reduction in zip(handle.entry.pictures, handle.entry.reductions, strict=True):
            kept, n = reduction.kept, len(picture.cells)
            assert len(kept) == laconic.Budget.parse(budget).tokens(n) and bool((kept.diff() > 0).all())
            assert bool(torch.isin(kept, picture.cells).all())
            if reduction.into is not None:
                into = reduction.into[picture.cells]
                assert torch.equal(reduction.into[kept], kept) and bool(torch.isin(into[into >= 0], kept).all())
            if reduction.features is not None:
                assert reduction.features.shape == (len(kept), picture.features.shape[1])
                assert bool(reduction.features.isfinite().all())
        held = handle.latest.layers[-1].n
        separators = int(handle.entry.pictures[-1].layout.separators.sum() + handle.entry.pictures[-2].layout.separators.sum())
        words = int((x["input_ids"][1] != vlm.IMAGE).sum())
        if family != "gemma3":
            assert held == words + separators + sum(len(r.kept) for r in handle.entry.reductions[1:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_fewer_tokens_change_something_and_repeat(name: str, family: str) -> None:
    model, x = prepared(name, family), vlm.inputs(family, (1, 2))
    with torch.no_grad():
        dense = model(**x).logits[:, -1]
        runs = []
        for _ in range(2):
            with laconic.apply(model, recipe(name, "30%")) as handle:
                runs.append(model(**x).logits[:, -1])
                assert handle.latest.layers[-1].n < x["input_ids"].shape[1]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], dense, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("name", [n for n in METHODS if "random" not in n])  # whose numbers follow the place in the batch
def test_a_padded_row_is_the_row_alone(name: str, family: str) -> None:
    model, x = prepared(name, family), vlm.inputs(family, (2, 1))
    with laconic.apply(model, recipe(name, "30%")), torch.no_grad():
        together = model.generate(**x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for row, alone in enumerate(split(family, x, (2, 1))):
        with laconic.apply(model, recipe(name, "30%")), torch.no_grad():
            single = model.generate(**alone, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(single.sequences[0, -4:], together.sequences[row, -4:])
        for one, all_ in zip(single.logits, together.logits, strict=True):
            torch.testing.assert_close(one[0], all_[row], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("other", ["tokenselect(sinks=1, recent=4):12", "snapkv(window=4):20", "fastv(layers=1):20%"])
def test_composes_with_what_comes_after(name: str, other: str) -> None:
    model, x = prepared(name, "llava"), vlm.inputs("llava", (1, 2))
    with laconic.apply(model, f"{recipe(name, '50%')} + {other}") as handle, torch.no_grad():
        out = model.generate(**x, max_new_tokens=5, do_sample=False)
        assert out.shape == (2, x["input_ids"].shape[1] + 5)
        assert all(layer.get_seq_length() == out.shape[1] - 1 for layer in handle.latest.layers)


@pytest.mark.parametrize("name", METHODS)
def test_a_text_without_pictures_is_left_alone(name: str) -> None:
    model, x = prepared(name, "llava"), vlm.inputs("llava", (0, 0))
    with torch.no_grad():
        expected = model.generate(**x, max_new_tokens=4, do_sample=False)
        with laconic.apply(model, recipe(name, "30%")):
            assert torch.equal(model.generate(**x, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("name", METHODS)
def test_beams_write_what_stock_beams_write_when_everything_stays(name: str) -> None:
    model, x = prepared(name, "llava"), vlm.inputs("llava", (1, 2))
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with torch.no_grad():
        with laconic.apply(model, recipe(name, "30%")) as handle:
            model.generate(**x, **options)
            assert handle.latest.layers[-1].n < x["input_ids"].shape[1]
        if METHODS[name].takes_budget:
            expected = model.generate(**x, **options)
            with laconic.apply(model, f"{name}:100%"):
                assert torch.equal(model.generate(**x, **options), expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_picture_in_the_same_conversation(name: str) -> None:
    """Its own budget, chosen as if nothing had been before; what the first turn left stays."""
    model = prepared(name, "llava")
    first, second = vlm.inputs("llava", (1,)), vlm.inputs("llava", (1,), seed=1)
    x = [{k: v for k, v in turn.items() if k != "attention_mask"} for turn in (first, second)]
    with torch.no_grad():
        out = model(**x[0], use_cache=True)
        expected = model(**x[1], cache=out.past_key_values).logits[:, -1]
        for budget in ("100%", "30%") if METHODS[name].takes_budget else ("",):
            with laconic.apply(model, recipe(name, budget)) as handle:
                cache = model(**x[0], use_cache=True).past_key_values
                before = [layer.n for layer in cache.layers]
                logits = model(**x[1], cache=cache).logits[:, -1]
                grown = [layer.n - n for layer, n in zip(handle.latest.layers, before, strict=True)]
                assert cache.get_seq_length() == first["input_ids"].shape[1] + second["input_ids"].shape[1]
            if budget == "100%":
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            else:
                assert grown[-1] < second["input_ids"].shape[1] and bool(logits.isfinite().all())


def test_what_is_refused_leaves_no_hook_behind() -> None:
    model = vlm.build("llava_siglip")
    count = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())  # noqa: E731
    before = count()
    with pytest.raises(laconic.LaconicError, match="class token"):
        laconic.apply(model, "fastv:50% + vtc_cls:50%")
    assert count() == before and "get_image_features" not in model.model.__dict__
