"""What is remembered of pictures outlives a crop: a detour that is cropped was never there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vlm
from test_neurons import build

import laconic
from laconic.cache import Lasting, cropped
from laconic.vision.cmai import COLUMNS
from laconic.vision.neurons import GATHERED
from laconic.vision.parking import PARKED

SAID = torch.tensor([[17, 33, 52, 8], [61, 44, 7, 29]])
DETOUR = torch.tensor([[9, 71, 23, 40, 12], [30, 6, 55, 18, 66]])


def turn(model: Any, x: dict[str, torch.Tensor], cache: Any, said: torch.Tensor) -> torch.Tensor:
    """Logits of what is said, and of two tokens that follow it one by one."""
    mask = x["attention_mask"].new_ones(len(said), 0)
    logits = []
    for part in (said, said[:, :1], said[:, 1:2]):
        mask = torch.cat([mask, torch.ones_like(part)], dim=1)
        whole = torch.cat([x["attention_mask"], mask], dim=1)
        logits.append(model(input_ids=part, attention_mask=whole, past_key_values=cache).logits[:, -part.shape[1] :])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("recipe", ["mmtok(share=0.01, rest=park):20%", "cmai(since=0)", "corematching(neurons=0.4):50%"])
def test_a_detour_that_is_cropped_was_never_there(recipe: str, family: str) -> None:
    model, x = build(family), vlm.inputs(family, (2, 1))
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        expected = turn(model, x, model(**x, use_cache=True).past_key_values, SAID)
        chosen = [reduction.kept for reduction in handle.entry.reductions]
        cache = model(**x, use_cache=True).past_key_values
        turn(model, x, cache, DETOUR)
        cache.crop(-DETOUR.shape[1] - 2)
        found = turn(model, x, cache, SAID)
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)
    if "park" in recipe:
        assert all(torch.equal(a, b.kept) for a, b in zip(chosen, handle.entry.reductions, strict=True))
    else:  # and what was remembered matters
        with laconic.apply(model, recipe), torch.no_grad():
            cache = model(**x, use_cache=True).past_key_values
            turn(model, x, cache, DETOUR)
            cache.crop(-DETOUR.shape[1] - 2)
            for layer in cache.layers:
                layer.memory.clear()
            cache.request.memory.clear()
            assert not torch.allclose(turn(model, x, cache, SAID), expected, atol=1e-3)


def test_a_crop_that_reaches_into_the_prompt_forgets_what_was_chosen_for_it() -> None:
    model, x = vlm.build("llava"), vlm.inputs("llava", (1,))
    behind = x["input_ids"].shape[1] - int((x["input_ids"][0] == vlm.IMAGE).nonzero()[-1]) - 1
    with laconic.apply(model, "mmtok(rest=park):20% + corematching(neurons=0.4):50%"), torch.no_grad():
        cache = model(**x, use_cache=True).past_key_values
        cache.crop(-1)
        assert PARKED in cache.request.memory and all(GATHERED not in layer.memory for layer in cache.layers)
        cache.crop(-behind)  # the last picture token goes
        assert PARKED not in cache.request.memory


def test_another_picture_in_place_of_one_that_was_cropped() -> None:
    model, turns = vlm.build("llava"), [vlm.inputs("llava", (1,), seed=seed) for seed in range(3)]
    first, detour, second = ({name: x[name] for name in ("input_ids", "pixel_values")} for x in turns)
    with laconic.apply(model, "cmai(since=0)"), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        expected = model(**second, cache=cache).logits
        cache = model(**first, use_cache=True).past_key_values
        model(**detour, cache=cache)
        cache.crop(-detour["input_ids"].shape[1])
        torch.testing.assert_close(model(**second, cache=cache).logits, expected, atol=5e-4, rtol=1e-3)
        assert int((cache.layers[0].memory[COLUMNS].tensor >= 0).sum()) == 128


def test_a_memory_after_a_crop() -> None:
    class Half:
        def cropped(self, left: int) -> int | None:
            return left if left > 3 else None

    memory = {"gone": torch.ones(2), "half": Half(), "all": Lasting(torch.arange(3))}
    assert set(cropped(memory, 3)) == {"all"} and cropped(memory, 5)["half"] == 5
    assert Lasting(torch.arange(3)).rows(torch.tensor([2, 0])).tensor.tolist() == [2, 0]
    twin = memory["all"].copy()
    twin.tensor[0] = 9
    assert memory["all"].tensor[0] == 0
