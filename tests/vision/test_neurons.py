"""Steps that compute core neurons only, against dense feed-forward parts with all other activations at zero."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import vlm

import laconic
from laconic.decoding import decode
from laconic.layers import decoder_layers
from laconic.vision.corematching import core_neurons
from laconic.vision.neurons import GATHERED, Neurons
from laconic.vision.see import asked_about, open_picture, read

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3", "paligemma")


@functools.cache
def build(family: str) -> Any:
    """A model whose feed-forward parts have a say."""
    model = copy.deepcopy(vlm.build(family))
    with torch.no_grad():
        for layer in decoder_layers(model):
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                projection.weight.mul_(5.0)
    return model


def write(model: Any, x: dict[str, torch.Tensor], recipe: str = "dense") -> tuple[torch.Tensor, torch.Tensor]:
    """What follows a prompt, greedily, and its logits (steps, batch, vocabulary)."""
    with laconic.apply(model, recipe), torch.no_grad():
        out = model.generate(**x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


def chosen_by_hand(model: Any, x: dict[str, torch.Tensor], share: float) -> list[torch.Tensor]:
    """Per layer the core neurons of each row, boolean (batch, neurons), from a dense prompt."""
    found: list[torch.Tensor] = []

    def vote(module: torch.nn.Module, args: tuple) -> None:
        chosen = torch.zeros(args[0].shape[0], args[0].shape[2], dtype=torch.bool)
        for row, z in enumerate(args[0]):
            votes = [0] * z.shape[-1]
            for token in z[x["attention_mask"][row].bool()].tolist():
                positive = sorted((i for i, value in enumerate(token) if value > 0), key=lambda i, t=token: -t[i])
                for i in positive[: -(-len(positive) * 4 // 10)]:
                    votes[i] += 1
            best = sorted(range(len(votes)), key=lambda i, v=votes: (-v[i], i))
            chosen[row, best[: round(share * len(votes))]] = True
        found.append(chosen)

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(vote) for layer in decoder_layers(model)]
    with torch.no_grad():
        model(**x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_dense_with_all_other_activations_at_zero(family: str) -> None:
    model, x = build(family), vlm.inputs(family, (2, 1))
    chosen = chosen_by_hand(model, x, 0.4)

    def silence(number: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple) -> torch.Tensor | None:
            return args[0] * chosen[number][:, None] if args[0].shape[1] == 1 else None

        return hook

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(silence(i)) for i, layer in enumerate(decoder_layers(model))]
    expected = write(model, x)
    for hook in hooks:
        hook.remove()
    found = write(model, x, "corematching(neurons=0.4)")
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=2e-4, rtol=1e-4)
    dense = write(model, x)
    assert torch.equal(dense[1][0], write(model, x, "corematching(neurons=0.4)")[1][0])  # the prompt itself is dense
    assert not torch.allclose(dense[1][1], found[1][1], atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_neurons_are_dense(family: str) -> None:
    model, x = build(family), vlm.inputs(family, (1,))
    dense = write(model, x)
    assert torch.equal(write(model, x, "corematching(neurons=1)")[1], dense[1])
    gathered = write(model, x, "corematching(neurons=0.999)")  # rounds to all of them
    assert torch.equal(gathered[0], dense[0])
    torch.testing.assert_close(gathered[1], dense[1], atol=1e-5, rtol=1e-5)


def test_rows_have_neurons_of_their_own_and_a_text_has_all() -> None:
    model, x = build("llava"), vlm.inputs("llava", (1, 0))
    recipe = "corematching(neurons=0.4):50%"
    together = write(model, x, recipe)[1]
    words = {name: x[name][1:, x["attention_mask"][1].argmax() :] for name in ("input_ids", "attention_mask")}
    picture = {"input_ids": x["input_ids"][:1], "attention_mask": x["attention_mask"][:1], "pixel_values": x["pixel_values"]}
    for row, alone in enumerate((picture, words)):
        torch.testing.assert_close(write(model, alone, recipe)[1][:, 0], together[:, row], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(write(model, words)[1][:, 0], together[:, 1], atol=2e-4, rtol=1e-4)


def test_a_copy_is_as_large_as_its_share_and_everything_is_taken_out_again() -> None:
    model, x = build("llava"), vlm.inputs("llava", (1,))
    hooks = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    with laconic.apply(model, "corematching(neurons=0.25):50%") as handle, torch.no_grad():
        model(**x)
        for layer in handle.latest.layers:
            neurons = layer.memory[GATHERED]
            assert [m.shape for m in (neurons.gate[0], neurons.up[0], neurons.down[0])] == [(12, 32), (12, 32), (32, 12)]
        with laconic.apply(model, "corematching(neurons=0.5)"):
            pass
        assert all("forward" in layer.mlp.__dict__ for layer in decoder_layers(model))
    assert hooks() == before and not any("forward" in layer.mlp.__dict__ for layer in decoder_layers(model))


def test_beams_and_debiased_methods_step_on_their_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: {"slope": [0.0] * 3, "height": [1.0] * 3})
    model, x = build("llava"), vlm.inputs("llava", (1, 2))
    debiased = "attention_debias(corematching(neurons=0.4), padding=false):50%"
    assert torch.equal(write(model, x, debiased)[1], write(model, x, "corematching(neurons=0.4):50%")[1])
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with torch.no_grad():
        dense = model.generate(**x, **options)
        with laconic.apply(model, "corematching(neurons=0.999)"):
            assert torch.equal(model.generate(**x, **options), dense)


def test_reordered_rows_keep_their_neurons() -> None:
    part = decoder_layers(build("llava"))[0].mlp
    chosen = torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.3
    x = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        whole = Neurons.of(part, chosen)
        torch.testing.assert_close(whole.rows(order)(x[order]), whole(x)[order])


def test_ties_and_tokens_without_a_positive_activation() -> None:
    z = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [0.0, 3.0, 0.0, 2.0], [5.0, 4.0, -1.0, 2.0]])
    assert core_neurons(z, 0.4, 0.5).tolist() == [1, 0]
    assert core_neurons(-z.abs(), 0.4, 0.75).tolist() == [0, 1, 2]


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(laconic.LaconicError, match="above 0"):
        laconic.get("corematching", neurons=0)
    with pytest.raises(laconic.LaconicError, match="at most 1"):
        laconic.get("corematching", neurons=1.1)


def test_a_draft_is_checked_by_the_neurons_that_steps_have() -> None:
    model, reader = laconic.load("shapes")
    picture, question = asked_about("scene:5", None)
    x = read(reader, question, [open_picture(picture)])
    recipe = "corematching(neurons=0.2):20%"
    alone = decode(model, x, recipe, max_new_tokens=40)
    drafted = decode(model, x, f"{recipe} + token_recycling:6", max_new_tokens=40)
    assert drafted.rows == alone.rows != decode(model, x, "corematching:20%", max_new_tokens=40).rows
    assert drafted.forwards < alone.forwards
