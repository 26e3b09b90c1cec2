"""Random drops between layers: chance, and schedules of several drops."""

from __future__ import annotations

import pytest
import torch
import vlm

import laconic
from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.vision import inside
from laconic.vision.random_drop import RandomDrop


def held(recipe: str, x: dict[str, torch.Tensor], family: str = "llava") -> list[list[int]]:
    """Places of the picture's tokens in each layer's cache after the prompt of one row."""
    image = (x["input_ids"][0] == vlm.IMAGE).nonzero()[:, 0]
    with laconic.apply(vlm.build(family), recipe) as handle, torch.no_grad():
        vlm.build(family)(**x)
        layers = [layer.positions[0, 0] for layer in handle.latest.layers]
    return [(image[torch.isin(image, positions)] - image[0]).tolist() for positions in layers]


def test_every_token_is_as_likely_to_stay_as_any_other() -> None:
    x, counts = vlm.inputs("internvl", (1,)), torch.zeros(16)
    for seed in range(160):
        counts[held(f"random_drop(seed={seed}):4", x, "internvl")[-1]] += 1
    assert float(((counts - 40) ** 2 / 40).sum()) < 37.7  # chi-square with 15 degrees of freedom, 0.1 %


def test_the_seed_decides_and_the_picture_does_not() -> None:
    x, other = vlm.inputs("llava", (1,)), vlm.inputs("llava", (1,), seed=3)
    kept = held("random_drop:20%", x)
    assert held("random_drop:20%", x) == kept and held("random_drop:20%", other)[-1] == kept[-1]
    assert held("random_drop(seed=1):20%", x)[-1] != kept[-1]


def test_a_method_before_a_random_drop_and_all_dropped_at_the_horizon() -> None:
    x = vlm.inputs("gemma3", (1,))
    before = held("divprune:50%", x, "gemma3")[0]
    layers = held("divprune:50% + random_drop(at=0.5):25% + withdraw(at=0.75, threshold=1)", x, "gemma3")
    assert layers[0] == layers[1] == before and len(before) == 8
    assert len(layers[2]) == 4 and set(layers[2]) < set(before) and layers[3] == []


def test_of_two_drops_after_the_same_layer_the_second_chooses_among_what_the_first_left() -> None:
    x = vlm.inputs("llava", (1, 1))
    recipes = ["random_drop(at=0.3):30%", "fastv(layers=1):40%"]
    alone = [set(held(recipe, x)[1]) for recipe in recipes]
    assert 0 < len(alone[0] & alone[1]) < len(alone[0])
    assert set(held(" + ".join(recipes), x)[1]) == alone[0]  # 40 % are more than there are
    both = set(held(" + ".join(reversed(recipes)), x)[1])
    assert alone[0] & alone[1] < both < alone[1] and len(both) == len(alone[0])


def test_it_drops_after_a_share_of_the_layers() -> None:
    x = vlm.inputs("gemma3", (1,))
    for at, full in ((0.01, 1), (0.3, 1), (0.5, 2), (0.75, 3), (0.99, 3)):
        assert [len(layer) for layer in held(f"random_drop(at={at}):25%", x, "gemma3")] == [16] * full + [4] * (4 - full)
    for at in ("0", "1"):
        with pytest.raises(laconic.LaconicError, match="share of the layers"):
            laconic.get("random_drop", at=at)


def test_the_last_tokens_attention_keeps_to_its_window_after_a_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, leave = [], RandomDrop.leave

    def compare(method: RandomDrop, layer: KVLayer, call: Call) -> None:
        given, _ = inside.attention_of(layer, call, 0, torch.tensor([layer.n - 1]))
        torch.testing.assert_close(inside.attention_of_last(layer, call), given, atol=1e-6, rtol=1e-5)
        windows.append((call.window, layer.n))
        leave(method, layer, call)

    monkeypatch.setattr(RandomDrop, "leave", compare)
    x = vlm.inputs("gemma3", (1,), text=15)
    with laconic.apply(vlm.build("gemma3"), "random_drop(at=0.3):30%"), torch.no_grad():
        vlm.build("gemma3")(**x)
    assert windows == [(24, 39), (None, 28), (24, 28), (None, 28)]
