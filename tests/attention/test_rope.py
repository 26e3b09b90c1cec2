"""Which table turns the keys of which layer, and what turning means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import vlm
from tiny import ARCHITECTURES, build, prompt, shared

import laconic
from laconic.attention.rope import Rope, describe, find_ropes
from laconic.profiles import Profile, find_profile, fingerprint

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
KINDS = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 12}
YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 128}
OTHERS = {  # name: (class of the configuration, what differs, pairs that each layer turns)
    "smollm3": ("SmolLM3Config", {}, [4, 4, 4, 0]),  # every fourth layer knows no positions
    "cohere2": ("Cohere2Config", {"head_dim": 8}, [4, 4, 4, 0]),  # nor here, and pairs lie side by side
    "modernbert_decoder": ("ModernBertDecoderConfig", {"cls_token_id": 1, "sep_token_id": 1, **KINDS}, [4, 4, 4, 4]),
    "olmo3": (
        "Olmo3Config",
        {**KINDS, "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        [4, 4, 4, 4],
    ),
    "glm4": ("Glm4Config", {"head_dim": 8}, [2, 2, 2, 2]),  # half of each head, side by side
}


def other(name: str) -> torch.nn.Module:
    """A small random model of another architecture."""
    kind, differs, _ = OTHERS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **differs)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    return model


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


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_a_models_own_rotation_is_found_in_every_layer(name: str) -> None:
    """What is found undoes what the model did: the cached key of one token is the same at every position, in all layers, for
    a token alone attends to itself and nothing else changes."""
    model = other(name) if name in OTHERS else shared(name)
    ropes, raw = find_ropes(model), []
    assert len(ropes) == model.config.num_hidden_layers
    with laconic.apply(model, "dense") as handle, torch.no_grad():
        for at in (0, 7, 300):
            cache = handle.cache()
            model(prompt(1, 1)["input_ids"], position_ids=torch.tensor([[at]]), past_key_values=cache)
            assert [layer.rope.frequencies.tolist() for layer in cache.layers] == [rope.frequencies.tolist() for rope in ropes]
            raw.append([rope.rotate(layer.keys, torch.tensor([-at])) for layer, rope in zip(cache.layers, ropes, strict=True)])
    for index, keys in enumerate(raw[0]):
        for there in raw[1:]:
            torch.testing.assert_close(there[index], keys, atol=1e-3, rtol=1e-3)
        for table in {tuple(rope.frequencies.tolist()) for rope in ropes} - {tuple(ropes[index].frequencies.tolist())}:
            wrong = Rope(torch.tensor(table), ropes[index].layout).rotate(cache.layers[index].keys, torch.tensor([-300]))
            assert not torch.allclose(wrong, keys, atol=1e-2)  # only its own table does it
    if name in OTHERS:
        assert [len(rope.frequencies) for rope in ropes] == OTHERS[name][2]


@pytest.mark.parametrize("name", ["gemma3", "smollm3"])
def test_a_layout_is_told_in_bf16_too(name: str) -> None:
    fresh = {"gemma3": lambda: build("gemma3"), "smollm3": lambda: other("smollm3")}[name]
    expected, found = find_ropes(fresh()), find_ropes(fresh().to(torch.bfloat16))
    assert [(r.layout, len(r.frequencies)) for r in found] == [(r.layout, len(r.frequencies)) for r in expected]


def test_an_empty_table_turns_nothing() -> None:
    x, rope = torch.randn(1, 2, 3, 8), Rope(torch.zeros(0))
    assert torch.equal(rope.rotate(x, torch.tensor([5, 6, 7])), x)
    assert torch.equal(rope.rotate_mean(x[:, :, 0], torch.tensor([9]), 4), x[:, :, 0])


def test_what_cannot_be_told_is_not_guessed() -> None:
    """No rotary embedding, several positions per token, and latents whose turned part is held apart."""
    assert find_ropes(torch.nn.Linear(2, 2)) == []
    gpt2 = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4)
    assert find_ropes(transformers.GPT2LMHeadModel(gpt2)) == [None] * 3
    for family in ("qwen2_vl", "qwen3_vl"):
        assert set(find_ropes(vlm.build(family))) == {None}
    latent = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(latent)
    assert find_ropes(model) == [None] * 4
    with pytest.raises(laconic.LaconicError, match="caches latents"):  # or methods would choose among what is not there
        laconic.apply(model, "streaming:8")


def test_the_tables_of_a_language_model_behind_eyes_are_its_own() -> None:
    for family in ("llava", "gemma3"):
        model = vlm.build(family)
        alone = transformers.AutoModelForCausalLM.from_config(model.config.get_text_config())
        assert describe(find_ropes(model)) == describe(find_ropes(alone)) is not None


def test_a_profile_describes_both_tables_and_is_refused_where_one_differs(tmp_path: Path) -> None:
    model, path = build("gemma3"), tmp_path / "p.json"
    thetas = {kind: part["rope_theta"] for kind, part in model.config.rope_parameters.items()}
    said = fingerprint(model)["rope"]
    assert [table["layers"] for table in said] == [[0], [1]]  # a local layer, and one that sees all
    for table, kind in zip(said, model.config.layer_types, strict=True):
        assert table["layout"] == "half" and table["pairs"] == 8
        assert table["slowest"] == pytest.approx(thetas[kind] ** (-14 / 16), rel=0.05)
    Profile("fasa", fingerprint(model), 0, "", {"ranking": []}).save(path)
    assert find_profile("fasa", str(path), model) == {"ranking": []}
    changed = {**model.config.rope_parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
    other_local = build("gemma3", rope_parameters=changed)
    assert fingerprint(other_local)["weights"] == fingerprint(model)["weights"]
    with pytest.raises(laconic.LaconicError, match="another model"):
        find_profile("fasa", str(path), other_local)


def test_one_table_for_all_layers_is_described_by_its_layout() -> None:
    assert fingerprint(shared())["rope"] == "half" and fingerprint(other("glm4"))["rope"] == "interleaved"
    assert fingerprint(vlm.build("qwen2_vl"))["rope"] is None


def test_a_profile_of_another_layout_is_refused(tmp_path: Path) -> None:
    known = fingerprint(shared())
    for rope in (None, "interleaved"):
        Profile("fasa", {**known, "rope": rope}, 0, "", {"ranking": []}).save(tmp_path / f"{rope}.json")
        with pytest.raises(laconic.LaconicError, match="another model"):
            find_profile("fasa", str(tmp_path / f"{rope}.json"), shared())
