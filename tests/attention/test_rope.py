from __future__ import annotations

import pytest
import torch
from tiny import prompt, shared

from laconic.attention.rope import Rope, find_rope


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("extra", [0, 4])
def test_turning_back_gives_what_was_there(layout: str, extra: int) -> None:
    rope = Rope(torch.tensor([1.0, 0.2, 0.01]), layout)
    x = torch.randn(2, 3, 50, 6 + extra)
    at = torch.arange(50) * 40
    there = rope.rotate(x, at)
    torch.testing.assert_close(rope.rotate(there, -at), x, atol=1e-4, rtol=1e-4)
    assert torch.equal(there[..., 6:], x[..., 6:])  # partial rotary: the rest is left alone
    assert not torch.allclose(there[..., 1:, :6], x[..., 1:, :6], atol=1e-2)


def test_only_the_distance_counts() -> None:
    rope = Rope(torch.tensor([1.0, 0.2, 0.01]))
    q, k = torch.randn(6), torch.randn(6)
    products = [
        rope.rotate(q[None], torch.tensor([a + 5])) @ rope.rotate(k[None], torch.tensor([a])).T for a in (0, 3, 900)
    ]
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "phi3", "gpt_neox", "olmo2", "mixtral"])
def test_a_models_own_rotation_is_found(name: str) -> None:
    """What is found undoes what the model did: the cached key of one token is the same at every position."""
    import laconic

    model = shared(name)
    rope = find_rope(model)
    assert rope is not None
    ids = prompt(1, 1)["input_ids"]
    raw = []
    with laconic.apply(model, "dense") as handle, torch.no_grad():
        for at in (0, 7, 300):
            cache = handle.cache()
            model(ids, position_ids=torch.tensor([[at]]), past_key_values=cache)
            raw.append(rope.rotate(cache.layers[0].keys, torch.tensor([-at])))
    for keys in raw[1:]:
        torch.testing.assert_close(keys, raw[0], atol=1e-3, rtol=1e-3)


def test_several_tables_or_none_are_not_guessed() -> None:
    assert find_rope(shared("gemma3")) is None
    assert find_rope(torch.nn.Linear(2, 2)) is None
