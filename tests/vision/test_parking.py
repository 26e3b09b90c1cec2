"""Parked picture tokens: a later turn that chooses others computes the conversation as if it had been asked all in one."""

from __future__ import annotations

import pytest
import torch
import vlm

import laconic
from laconic.decoding import decode

FAMILIES = ("llava", "llava_siglip", "llava_next", "llava_onevision", "internvl", "idefics3")
RECIPE = "mmtok(share=0.01, rest=park):20%"  # whose choice follows the words


def turns(family: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A prompt with pictures, two rows of different length, and what is said in the second turn."""
    return vlm.inputs(family, (2, 1)), torch.tensor([[17, 33, 52, 8], [61, 44, 7, 29]])


def second(model, cache, x: dict[str, torch.Tensor], said: torch.Tensor) -> torch.Tensor:
    mask = torch.cat([x["attention_mask"], torch.ones_like(said)], dim=1)
    return model(input_ids=said, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_turn_is_the_whole_asked_at_once(family: str) -> None:
    model, (x, said) = vlm.build(family), turns(family)
    whole = {**x, "input_ids": torch.cat([x["input_ids"], said], dim=1)}
    whole["attention_mask"] = (whole["input_ids"] != 0).long()
    if "mm_token_type_ids" in x:
        whole["mm_token_type_ids"] = (whole["input_ids"] == vlm.IMAGE).long()
    with torch.no_grad(), laconic.apply(model, RECIPE) as handle:
        expected = model(**whole).logits[:, -said.shape[1] :]
        chosen = [reduction.kept for reduction in handle.entry.reductions]
        cache = model(**x).past_key_values
        first = [reduction.kept for reduction in handle.entry.reductions]
        length = cache.get_seq_length()
        found = second(model, cache, x, said)
        assert any(not torch.equal(a, b) for a, b in zip(first, chosen, strict=True))
        assert all(torch.equal(a.kept, b) for a, b in zip(handle.entry.reductions, chosen, strict=True))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert cache.get_seq_length() == length + said.shape[1] and cache.layers[0].n < length


def test_without_parking_the_first_choice_stays() -> None:
    model, (x, said) = vlm.build("llava"), turns("llava")
    with torch.no_grad(), laconic.apply(model, RECIPE.replace("rest=park", "rest=drop")):
        cache = model(**x).past_key_values
        held = cache.layers[0].shared_positions[:, 0].clone()
        second(model, cache, x, said)
    assert torch.equal(cache.layers[0].shared_positions[:, 0, : held.shape[1]], held)


def test_a_choice_that_stays_costs_nothing_again() -> None:
    model, (x, said) = vlm.build("llava"), turns("llava")
    with torch.no_grad(), laconic.apply(model, "divprune(rest=park):20%"):
        cache = model(**x).past_key_values
        rows = []
        hook = model.model.language_model.layers[0].register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[1]))
        second(model, cache, x, said)
        hook.remove()
    assert rows == [said.shape[1]]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_turns_through_generate_with_what_was_answered_between(family: str) -> None:
    model, (x, said) = vlm.build(family), turns(family)
    special = [vlm.IMAGE, vlm.VIDEO, vlm.START, vlm.END]
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": special}
    with torch.no_grad(), laconic.apply(model, RECIPE) as handle:
        one = model.generate(**x, past_key_values=handle.cache(), max_new_tokens=3, **options)
        ids = torch.cat([one.sequences, said], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.cat([x["attention_mask"], torch.ones_like(ids[:, -7:])], dim=1)}
        if "mm_token_type_ids" in x:
            whole["mm_token_type_ids"] = (ids == vlm.IMAGE).long()
        two = model.generate(**whole, past_key_values=one.past_key_values, max_new_tokens=4, **options)
        again = [reduction.kept for reduction in handle.entry.reductions]
        fresh = model.generate(**{**x, **whole}, max_new_tokens=4, **options)
        assert all(torch.equal(a, r.kept) for a, r in zip(again, handle.entry.reductions, strict=True))
    assert torch.equal(two.sequences, fresh.sequences)
    torch.testing.assert_close(torch.stack(two.logits), torch.stack(fresh.logits), atol=2e-4, rtol=1e-3)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(laconic.LaconicError, match="leave out positions=compact"):
        laconic.apply(vlm.build("llava"), "mmtok(rest=park, positions=compact):20%")
    with laconic.apply(vlm.build("gemma3"), RECIPE), pytest.raises(laconic.LaconicError, match="leave out rest=park"):
        vlm.build("gemma3")(**vlm.inputs("gemma3", (1,)))
    model, x = vlm.build("llava"), vlm.inputs("llava", (1,))
    with torch.no_grad(), laconic.apply(model, RECIPE):
        cache = model(**x).past_key_values
        mask = torch.cat([x["attention_mask"], x["attention_mask"]], dim=1)
        with pytest.raises(laconic.LaconicError, match="start a new cache"):
            model(**{**x, "attention_mask": mask}, past_key_values=cache)
    with pytest.raises(laconic.LaconicError, match="leave rest=park or the drafter out"):
        decode(model, x, f"{RECIPE} + prompt_lookup", max_new_tokens=4)
