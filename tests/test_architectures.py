"""Under ``dense`` every architecture says, token for token, what it says without us."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, build, generate, prompt, shared

import laconic
from laconic.decoding.engine import decode

NAMES = list(ARCHITECTURES)
PADS = (0, 7, 20)
FULL = ["dense", "tokenselect:4096", "h2o:4096", "snapkv:100%", "recycled_attention:4096"]


def same(model: Any, inputs: dict[str, torch.Tensor], tokens: int, recipe: str = "dense", **options: Any) -> None:
    torch.manual_seed(11)
    chunk = options.pop("prefill_chunk_size", None)
    stock = generate(model, inputs, tokens, **options)
    torch.manual_seed(11)
    with laconic.apply(model, recipe):
        ours = generate(model, inputs, tokens, **options, **({"prefill_chunk_size": chunk} if chunk else {}))
    assert stock.shape[1] >= inputs["input_ids"].shape[1] + tokens
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"prefill_chunk_size": 16}],
    ids=["greedy", "beams", "sampling", "chunks"],
)
def test_dense_generates_what_stock_generates(name: str, options: dict[str, Any]) -> None:
    same(shared(name), prompt(3, 40, pads=PADS), 16, **options)


@pytest.mark.parametrize("recipe", FULL)
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_a_budget_beyond_the_length_is_dense(name: str, recipe: str) -> None:
    same(shared(name), prompt(3, 30, pads=PADS), 10, recipe)


def test_dense_stays_with_stock_over_256_steps() -> None:
    same(shared("llama"), prompt(2, 24, pads=(0, 9)), 256)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_that_passed_many_times_is_dense(name: str) -> None:
    same(shared(name), prompt(2, 5, pads=(0, 2)), 70)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_drafting_crops_the_cache(name: str) -> None:
    inputs = prompt(1, 12)
    inputs["input_ids"] = inputs["input_ids"].repeat(1, 3)
    inputs["attention_mask"] = inputs["attention_mask"].repeat(1, 3)
    same(shared(name), inputs, 30, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_cache", [True, False, None])
def test_a_plain_forward_has_stock_logits(name: str, use_cache: bool | None) -> None:
    model, inputs = shared(name), prompt(3, 33, seed=4, pads=PADS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs, use_cache=use_cache).logits
        with laconic.apply(model, "dense"):
            ours = model(**inputs, use_cache=use_cache)
    torch.testing.assert_close(ours.logits[real], stock[real], atol=2e-4, rtol=2e-4)
    assert (ours.past_key_values is None) == (use_cache is False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", ["dense", "snapkv(window=4):14 + tokenselect(sinks=1, recent=3):8", "tova:9"])
def test_a_left_padded_row_is_the_row_alone(name: str, recipe: str) -> None:
    model, inputs = shared(name), prompt(3, 40, seed=2, pads=PADS)
    with laconic.apply(model, recipe):
        together = generate(model, inputs, 10)
        for row, pad in enumerate(PADS):
            alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, pad:]}, 10)
            assert torch.equal(together[row, -10:], alone[0, -10:])


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_close_to_stock_bf16(name: str) -> None:
    model = build(name, sharpen=2.0).to(torch.bfloat16)
    inputs = prompt(2, 24, pads=(0, 6))
    options = {"return_dict_in_generate": True, "output_logits": True}
    stock = generate(model, inputs, 6, **options)
    with laconic.apply(model, "dense"):
        ours = generate(model, inputs, 6, **options)
    assert ours.logits[0].dtype == stock.logits[0].dtype
    same_text = torch.ones(2, dtype=torch.bool)
    for step, (a, b) in enumerate(zip(ours.logits, stock.logits, strict=True)):
        spread = float(b.float().std())
        assert torch.isfinite(a).all()
        if same_text.any():
            torch.testing.assert_close(a[same_text].float(), b[same_text].float(), atol=0.25 * spread, rtol=0.0)
        same_text &= ours.sequences[:, 24 + step] == stock.sequences[:, 24 + step]


def test_models_that_cache_latents_run_densely() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    same(model, prompt(2, 20, pads=(0, 5)), 12)
    for recipe in ("tokenselect:4096", "h2o:8"):
        with pytest.raises(laconic.LaconicError, match="caches latents"):
            laconic.apply(model, recipe)
    with pytest.raises(laconic.LaconicError, match="cannot check drafts"):
        decode(model, prompt(1, 20), "prompt_lookup:4", max_new_tokens=4)
