from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, build, generate, prompt, shared

import laconic
from laconic import LaconicError
from laconic.cache import KVCache


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that a recipe could leave behind in a model."""
    return {
        "attention": [
            m.config._attn_implementation
            for m in model.modules()
            if hasattr(getattr(m, "config", None), "_attn_implementation")
        ],
        "internal": copy.deepcopy(model.config.__dict__),
        "hooks": [
            (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_pre_hooks_with_kwargs))
            for m in model.modules()
        ],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "parameters": {k: v.clone() for k, v in model.state_dict().items()},
        "methods": [m.__dict__.get("forward") for m in model.modules()],
    }


def assert_untouched(model: torch.nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    for name in ("attention", "internal", "hooks", "attributes", "methods"):
        assert after[name] == before[name], name
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, value in before["parameters"].items():
        assert torch.equal(after["parameters"][name], value), name


def one_sentence(error: pytest.ExceptionInfo[LaconicError]) -> str:
    message = str(error.value)
    assert "\n" not in message and message[-1] in ".?" and len(message) < 300, message
    return message


# --- in and out ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_comes_back_as_it_was(name: str, implementation: str) -> None:
    model, inputs = build(name), prompt(2, 20, pads=(0, 3))
    model.set_attn_implementation(implementation)
    before, said = fingerprint(model), generate(model, inputs, 8)
    with laconic.apply(model, "h2o:8"):
        assert model.config.get_text_config()._attn_implementation == "laconic"
        assert not torch.equal(generate(model, inputs, 8), said)  # otherwise this test shows nothing
    assert_untouched(model, before)
    assert torch.equal(generate(model, inputs, 8), said)


def test_an_exception_inside_takes_the_recipe_out() -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with laconic.apply(model, "h2o:8"):
            generate(model, prompt(), 2)
            raise ZeroDivisionError
    assert_untouched(model, before)


def test_an_exception_inside_a_forward_takes_the_recipe_out() -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(LaconicError):  # noqa: SIM117
        with laconic.apply(model, "knorm(sinks=4, recent=16):8"):
            generate(model, prompt(), 2)
    assert_untouched(model, before)


def test_without_a_block_remove_takes_it_out_and_may_be_called_twice() -> None:
    model = build()
    before = fingerprint(model)
    handle = laconic.apply(model, "streaming:8")
    assert generate(model, prompt(), 3, return_dict_in_generate=True).past_key_values.layers[0].n == 8
    handle.remove()
    assert_untouched(model, before)
    handle.remove()
    assert_untouched(model, before)


def test_nested_blocks_the_innermost_is_in_force() -> None:
    model = build()
    before = fingerprint(model)

    def kept() -> int:
        return generate(model, prompt(), 3, return_dict_in_generate=True).past_key_values.layers[0].n

    with laconic.apply(model, "streaming:8"):
        assert kept() == 8
        with laconic.apply(model, "streaming:12"):
            assert kept() == 12
            with laconic.apply(model, "dense"):
                assert kept() == 42
            assert kept() == 12
        assert kept() == 8
    assert_untouched(model, before)


def test_one_handle_can_be_entered_again() -> None:
    model = build()
    before = fingerprint(model)
    handle = laconic.apply(model, "streaming:8")
    with handle, handle:
        with handle:
            generate(model, prompt(), 2)
        assert handle.stats()["kept"] == 8
    assert_untouched(model, before)
    with handle:
        out = generate(model, prompt(), 2, return_dict_in_generate=True)
        assert out.past_key_values.layers[0].n == 8
    assert_untouched(model, before)


def test_handles_can_be_removed_in_any_order() -> None:
    model = build()
    before = fingerprint(model)
    first, second = laconic.apply(model, "streaming:8"), laconic.apply(model, "streaming:12")
    first.remove()
    assert generate(model, prompt(), 2, return_dict_in_generate=True).past_key_values.layers[0].n == 12
    second.remove()
    assert_untouched(model, before)


def test_two_models_do_not_meet() -> None:
    one, two = build(seed=1), build(seed=2)
    with laconic.apply(one, "streaming:8"), laconic.apply(two, "streaming:12"):
        for model, kept in ((one, 8), (two, 12), (one, 8)):
            assert generate(model, prompt(), 2, return_dict_in_generate=True).past_key_values.layers[1].n == kept
    assert one.config._attn_implementation == two.config._attn_implementation == "sdpa"


def test_requests_do_not_meet() -> None:
    """Two requests that take turns inside one block say what each says alone."""
    model, texts = shared(), [prompt(1, 30, seed=s)["input_ids"] for s in (1, 2)]
    with laconic.apply(model, "h2o:10 + tokenselect(sinks=1, recent=2):6") as handle, torch.no_grad():

        def steps(ids: torch.Tensor, cache: Any) -> Any:
            yield model(ids[:, :20], past_key_values=cache).logits[:, -1]
            for i in range(20, 30):
                yield model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1]

        alone = [list(steps(ids, handle.cache())) for ids in texts]
        caches = handle.cache(), handle.cache()
        for turn, pair in enumerate(
            zip(*(steps(ids, cache) for ids, cache in zip(texts, caches, strict=True)), strict=True)
        ):
            for who in (0, 1):
                assert torch.equal(pair[who], alone[who][turn])


# --- caches that come and go -----------------------------------------------------------------------------------------
def test_a_second_turn_goes_on_with_the_cache() -> None:
    model, inputs = shared(), prompt(2, 20, pads=(0, 6))

    def two_turns() -> torch.Tensor:
        first = generate(model, inputs, 6, return_dict_in_generate=True)
        more = torch.cat([first.sequences, prompt(2, 9, seed=5)["input_ids"]], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 15, dtype=torch.int64)], dim=1)
        return generate(model, {"input_ids": more, "attention_mask": mask}, 6, past_key_values=first.past_key_values)

    stock = two_turns()
    with laconic.apply(model, "dense"):
        assert torch.equal(two_turns(), stock)
    with laconic.apply(model, "streaming:12"):
        out = two_turns()
    assert out.shape == stock.shape


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("pads", [(0, 0), (0, 6)])
def test_a_stock_cache_with_text_in_it_is_taken_over(name: str, pads: tuple[int, int]) -> None:
    from transformers import DynamicCache

    model, inputs = shared(name), prompt(2, 30, pads=pads)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def rest(cache: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
                for i in range(20, 30)
            ]

    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    stock = rest(caches[0])
    with laconic.apply(model, "dense"):
        ours = rest(caches[1])
    assert isinstance(caches[1], KVCache) and caches[1].get_seq_length() == 30
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "recipe", ["h2o:8", "tokenselect(sinks=1, recent=2, positions=compact):8", "snapkv(window=4):8"]
)
def test_every_verb_goes_on_from_a_stock_cache(recipe: str) -> None:
    from transformers import DynamicCache

    model, ids = shared(), prompt(1, 30)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with laconic.apply(model, recipe) as handle:
            model(ids[:, 20:25], past_key_values=cache)
            model(ids[:, 25:26], past_key_values=cache)
            assert handle.stats()["kept"] <= 9
    assert cache.layers[0].positions[0, 0, -1] == 25


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_other_caches_of_generate_work_or_are_refused(kind: str) -> None:
    model, inputs = shared(), prompt(2, 20, pads=(0, 5))
    stock = generate(model, inputs, 8)
    with laconic.apply(model, "dense"):
        try:
            ours = generate(model, inputs, 8, cache_implementation=kind)
        except (LaconicError, ImportError):
            return
    assert torch.equal(ours, stock)


def test_a_static_cache_with_text_in_it_is_refused() -> None:
    from transformers import StaticCache

    model, ids = shared(), prompt(1, 20)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        with laconic.apply(model, "dense"), pytest.raises(LaconicError) as error:
            model(ids[:, 10:], past_key_values=cache)
    one_sentence(error)


def test_a_cache_of_the_user_with_reserve_never_moves() -> None:
    model, ids = shared(), prompt(1, 20)["input_ids"]
    with laconic.apply(model, "dense", reserve=200) as handle:
        cache = handle.cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            address = cache.layers[0].keys.data_ptr()
            for _ in range(150):
                model(ids[:, -1:], past_key_values=cache)
        assert cache.layers[0].keys.data_ptr() == address


def test_a_forward_with_gradients_decodes_too() -> None:
    model, ids = shared(), prompt(1, 20)["input_ids"]
    with torch.no_grad():
        stock = model(ids).logits[:, -1]
    with laconic.apply(model, "dense") as handle:
        cache = handle.cache()
        model(ids[:, :-1], past_key_values=cache)
        ours = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(ours, stock, atol=2e-4, rtol=2e-4)


def test_embeddings_instead_of_tokens() -> None:
    model, inputs = shared(), prompt(2, 20, pads=(0, 5))
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    stock = generate(model, embeds, 8)
    with laconic.apply(model, "dense"):
        assert torch.equal(generate(model, embeds, 8), stock)


def test_beams_keep_their_own_positions() -> None:
    """Under an evicting method the beams of a batch are what they are for each prompt alone."""
    model, inputs = shared(), prompt(2, 30, pads=(0, 11))
    with laconic.apply(model, "h2o(recent=2):10"):
        together = generate(model, inputs, 8, num_beams=3)
        for row, pad in ((0, 0), (1, 11)):
            alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, pad:]}, 8, num_beams=3)
            assert torch.equal(together[row, -8:], alone[0, -8:])


# --- figures ---------------------------------------------------------------------------------------------------------
def test_figures_count_entries_and_bytes() -> None:
    model, ids = shared(), prompt(1, 40)["input_ids"]
    row = 2 * 2 * 8 * 4  # kv heads, keys and values, head size, bytes of a float
    with laconic.apply(model, "dense") as handle:
        generate(model, {"input_ids": ids}, 2)
        dense = handle.stats()
    assert dense["kept"] == 41 and dense["bytes_kept"] == dense["bytes_read"] == 2 * 41 * row
    assert dense["dropped_mass"] is None
    with laconic.apply(model, "streaming:10", measure=True) as handle:
        generate(model, {"input_ids": ids}, 2)
        evicted = handle.stats()
    assert evicted["kept"] == 10 and evicted["bytes_kept"] == 2 * 10 * row
    assert 0 < evicted["dropped_mass"] < 1
    with laconic.apply(model, "recycled_attention(kernel=1, every=99):10", measure=True) as handle:
        generate(model, {"input_ids": ids}, 3)
        read = handle.stats()
    assert read["kept"] == 10 and read["bytes_kept"] == 2 * 42 * row and read["bytes_read"] == 2 * 10 * row
    assert 0 < read["dropped_mass"] < 1
    with laconic.apply(model, "dense", measure=True) as handle:
        generate(model, {"input_ids": ids}, 2)
        assert handle.stats()["dropped_mass"] == 0.0


def test_figures_before_any_forward_are_refused() -> None:
    with laconic.apply(build(), "dense") as handle, pytest.raises(LaconicError) as error:
        handle.stats()
    one_sentence(error)


# --- refusals --------------------------------------------------------------------------------------------------------
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}


def refused_model(name: str) -> Any:
    import transformers as t

    if name == "encoder-decoder":
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    if name == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(**SMALL, state_size=4))
    if name == "linear":
        return t.Qwen3NextForCausalLM(
            t.Qwen3NextConfig(
                **SMALL, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
                num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
                linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
            )
        )  # fmt: skip
    if name == "bidirectional":
        sizes = {**SMALL, "num_attention_heads": 4, "intermediate_size": 48}
        return t.BertLMHeadModel(t.BertConfig(**sizes))
    if name == "no attention registry":
        return t.BloomForCausalLM(t.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    return torch.nn.Linear(3, 3)


@pytest.mark.parametrize(
    "name", ["encoder-decoder", "mamba", "linear", "bidirectional", "no attention registry", "no transformer"]
)
def test_what_cannot_work_is_refused_and_left_alone(name: str) -> None:
    model = refused_model(name).eval()
    before = sorted(model.__dict__)
    with pytest.raises(LaconicError) as error:
        laconic.apply(model, "h2o:8")
    assert type(model).__name__ in one_sentence(error)
    assert sorted(model.__dict__) == before


def test_something_that_is_no_model_is_refused() -> None:
    for wrong in (None, "meta-llama/Llama", 3):
        with pytest.raises(LaconicError) as error:
            laconic.apply(wrong, "h2o:8")  # type: ignore[arg-type]
        one_sentence(error)


def test_a_recipe_that_cannot_work_leaves_the_model_alone() -> None:
    model = build()
    before = fingerprint(model)
    for recipe in ("tokenselect:64 + recycled_attention:64", "tokenselect:64 + tokenselect:8", "nothing:3", "h2o:0"):
        with pytest.raises(LaconicError) as error:
            laconic.apply(model, recipe)
        one_sentence(error)
        assert_untouched(model, before)


def forward_refused(model: Any, **inputs: Any) -> str:
    with laconic.apply(model, "h2o:16"), pytest.raises(LaconicError) as error, torch.no_grad():
        model(**inputs)
    return one_sentence(error)


def test_padding_on_the_right_is_refused() -> None:
    inputs = prompt(2, 10)
    inputs["attention_mask"][1, -3:] = 0
    assert "left" in forward_refused(shared(), **inputs)
    inputs["attention_mask"][1] = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    forward_refused(shared(), **inputs)


def test_a_mask_of_the_wrong_length_is_refused() -> None:
    model, ids = shared(), prompt(1, 12)["input_ids"]
    with laconic.apply(model, "dense") as handle, torch.no_grad():
        cache = handle.cache()
        model(ids[:, :8], past_key_values=cache)
        with pytest.raises(LaconicError) as error:
            model(ids[:, 8:], attention_mask=torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
    assert "12" in one_sentence(error)


def test_a_4d_mask_is_refused() -> None:
    mask = torch.ones(1, 1, 10, 10).tril().bool()
    assert "4-D" in forward_refused(shared(), input_ids=prompt(1, 10)["input_ids"], attention_mask=mask)


def test_training_dropout_is_refused() -> None:
    model = build(attention_dropout=0.5).train()
    assert "eval" in forward_refused(model, **prompt(1, 10))
    model.eval()
    with laconic.apply(model, "h2o:16"):
        generate(model, prompt(1, 10), 2)


def test_packed_texts_are_refused() -> None:
    ids = prompt(1, 12)["input_ids"]
    forward_refused(shared(), input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]))


def test_a_budget_that_cannot_hold_the_protected_tokens_is_refused() -> None:
    for recipe in ("knorm(sinks=4, recent=16):8", "tokenselect(sinks=4, recent=16):8", "snapkv(window=32):8"):
        with laconic.apply(shared(), recipe), pytest.raises(LaconicError) as error:
            generate(shared(), prompt(1, 40), 2)
        assert "8" in one_sentence(error) and recipe.split("(")[0] in str(error.value)


def test_a_pattern_beyond_the_causal_mask_is_refused() -> None:
    ids = prompt(1, 12)["input_ids"]
    packed = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    forward_refused(shared(), input_ids=ids, position_ids=packed, use_cache=False)
