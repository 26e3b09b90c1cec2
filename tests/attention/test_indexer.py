"""The search in two stages inside models that carry an indexer."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import generate, prompt, shared

from laconic import LaconicError
from laconic.attention.indexer import hierarchical, search
from laconic.kernels.blocks import KeyBlocks

MODELS = ["DeepseekV32", "GlmMoeDsa"]


@functools.cache
def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        index_topk=12, index_head_dim=16, index_n_heads=24,
    )  # fmt: skip
    # with few heads, many tokens score exactly 0, and which of them are chosen is not defined
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = None
    return model


def flat(query, keys, weights, visible, topk):
    """Scores by the definition, per query a list of (score, token), best first."""
    scores = torch.einsum("bsh,bsht->bst", weights, torch.einsum("bshd,btd->bsht", query, keys).relu())
    return scores.masked_fill(~visible, -torch.inf).topk(min(topk, keys.shape[1]), dim=-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 40), st.integers(1, 12), st.integers(2, 8))
def test_search_against_the_flat_one(seed, block, n, topk, blocks):
    g = torch.Generator().manual_seed(seed)
    rows = min(n, 5)
    query, keys = torch.randn(2, rows, 24, 6, generator=g), torch.randn(2, n, 6, generator=g)
    weights = torch.randn(2, rows, 24, generator=g)
    start = torch.randint(0, n - rows + 1, (2, 1, 1), generator=g)
    end = torch.arange(n - rows, n)[:, None]
    visible = (torch.arange(n) >= start) & (torch.arange(n) <= end)
    means = KeyBlocks(keys[:, None], block, kind="mean")
    found = search(query, keys, weights, visible, topk, blocks, means)
    best = flat(query, keys, weights, visible, topk)
    assert found.shape == (2, rows, min(topk, n))
    for b in range(2):
        for r in range(rows):
            seen = visible[b, r].nonzero()[:, 0].tolist()
            first, last = seen[0] // block, seen[-1] // block
            got, held = set(found[b, r].tolist()), last - first + 1
            assert got <= set(seen)
            if held <= blocks:
                assert got == set(best.indices[b, r][best.values[b, r] > -torch.inf].tolist())
            if topk <= (blocks - 2) * block + 2 or held <= blocks:
                assert len(got) == min(len(seen), topk)
            scores = torch.einsum("h,hj->j", weights[b, r], (query[b, r] @ means.mean[b, 0].T).relu()).tolist()
            worth = {j: torch.inf if j in (first, last) else scores[j] for j in range(first, last + 1)}
            chosen = sorted(worth, key=lambda j: -worth[j])[:blocks]
            assert {s // block for s in got} <= set(chosen)


def test_few_blocks_hold_too_few_tokens():
    """Why the number of blocks is checked: four tokens in a block, the last block with one of them."""
    keys = torch.randn(1, 13, 6)
    found = search(
        torch.randn(1, 1, 4, 6), keys, torch.rand(1, 1, 4), torch.ones(1, 1, 13, dtype=torch.bool), 8, 2,
        KeyBlocks(keys[:, None], 4, kind="mean"),
    )  # fmt: skip
    assert len(set(found.flatten().tolist())) == 5


@pytest.mark.parametrize("kind", ["runs of one direction", "random"])
def test_overlap_with_the_flat_search(kind: str) -> None:
    """Intersection over union of 2,048 / 16 tokens out of 4,096: above 99 % where neighbours are alike."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 4096, 32, generator=g)
    if kind != "random":
        topics = torch.randn(1, 64, 1, 32, generator=g).expand(-1, -1, 64, -1).flatten(1, 2)
        keys = topics + 0.1 * keys
    query, weights = torch.randn(1, 8, 8, 32, generator=g), torch.rand(1, 8, 8, generator=g)
    visible = torch.ones(1, 8, 4096, dtype=torch.bool)
    found = search(query, keys, weights, visible, 128, 8, KeyBlocks(keys[:, None], 64, kind="mean"))
    best = flat(query, keys, weights, visible, 128).indices
    overlap = [
        len(a & b) / len(a | b) for a, b in zip(map(set, found[0].tolist()), map(set, best[0].tolist()), strict=True)
    ]
    mean = sum(overlap) / len(overlap)
    assert mean > 0.99 if kind != "random" else mean < 0.5, mean


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_enough_blocks_leave_the_model_as_it_is(name: str, implementation: str) -> None:
    model, inputs = build(name), prompt(2, 60, pads=(0, 11))
    model.set_attn_implementation(implementation)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs).logits
        with hierarchical(model, block=4, blocks=15):
            ours = model(**inputs).logits
        with hierarchical(model, block=4, blocks=5):
            few = model(**inputs).logits
        again = model(**inputs).logits
    torch.testing.assert_close(ours[real], stock[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(few[real], stock[real], atol=1e-3)
    assert torch.equal(again, stock)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}], ids=["greedy", "beams", "chunks"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_enough_blocks(name: str, options: dict[str, int]) -> None:
    model, inputs = build(name), prompt(2, 40, seed=1, pads=(0, 7))
    stock = generate(model, inputs, 12, **options)
    with hierarchical(model, block=8, blocks=20):
        assert torch.equal(generate(model, inputs, 12, **options), stock)


def test_a_step_continues_the_means_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = KeyBlocks.__init__
    monkeypatch.setattr(KeyBlocks, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1])
    with hierarchical(build("DeepseekV32"), block=4, blocks=10):
        few = generate(build("DeepseekV32"), prompt(1, 30), 10, use_cache=True)
    assert few.shape == (1, 40) and len(made) == 2  # one for each layer, and none for the steps


def test_what_cannot_work_is_refused() -> None:
    for model, options, words in (
        (shared(), {}, "no indexer"),
        (build("DeepseekV32"), {"block": 4, "blocks": 4}, "at least 5 blocks"),
        (build("DeepseekV32"), {"block": 40, "blocks": 1}, "at least 3 blocks"),
    ):
        with pytest.raises(LaconicError, match=words), hierarchical(model, **options):
            pass
