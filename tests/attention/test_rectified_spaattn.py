"""Rectified block-sparse attention against dense attention, and inside a diffusion transformer."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import laconic
from laconic.errors import LaconicError


def method(budget: str = "10%", **options):
    return laconic.get("rectified_spaattn", budget=budget, **{"coverage": 0.0, **options})


def qkv(n: int = 96, *, heads: int = 2, dim: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, n, dim, generator=generator) for _ in range(3)]


def clusters(moved: float, *, blocks: int = 32, size: int = 16, dim: int = 16) -> list[torch.Tensor]:
    """Blocks of tokens around a centre each, of which a share has its key and value exchanged with that of other blocks."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(2, blocks, 1, dim, generator=generator)
    key, value = ((c + 0.2 * torch.randn(blocks, size, dim, generator=generator)).flatten(0, 1) for c in centres)
    count = int(moved * len(key))
    chosen = torch.randperm(len(key), generator=generator)[:count]
    other = chosen[torch.randperm(count, generator=generator)]
    key[chosen], value[chosen] = key[other], value[other]
    query = centres[0] + 0.2 * torch.randn(blocks, size, dim, generator=generator)
    return [t[None, None] for t in (query.flatten(0, 1), key, value)]


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("rectify", ["gated", "all"])
def test_blocks_of_one_token_are_exact_for_any_choice(text: int, rectify: str) -> None:
    query, key, value = qkv(40)
    output, figures = method(block=1, rectify=rectify).attend(query, key, value, text=text)
    assert figures["read"] < 0.2
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rectify", ["gated", "all", "scale", "none"])
@pytest.mark.parametrize("text", [0, 7])
def test_reading_all_blocks_is_dense(rectify: str, text: int) -> None:
    query, key, value = qkv(101)  # the last block is shorter
    output, figures = method("100%", block=16, rectify=rectify).attend(query, key, value, text=text)
    assert figures == {"read": 1.0, "added": 0.0}
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rectify", ["gated", "all", "none"])
def test_what_is_read_and_what_is_added_share_the_whole_weight(rectify: str) -> None:
    query, key, _ = qkv(100)
    output, figures = method(block=16, rectify=rectify).attend(query, key, torch.ones_like(key), text=3)
    assert figures["added"] == pytest.approx({"none": 0.0, "all": 1 - figures["read"]}.get(rectify, figures["added"]))
    torch.testing.assert_close(output, torch.ones_like(output), atol=1e-5, rtol=1e-5)


def test_blocks_of_equal_tokens_are_exact_for_any_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 8, generator=generator).repeat_interleave(16, 2) for _ in range(3))
    words = [torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3)]
    query, key, value = (torch.cat(pair, 2) for pair in zip((query, key, value), words, strict=True))
    output, figures = method(block=16).attend(query, key, value, text=5)
    assert figures["read"] < 0.5 and figures["added"] > 0.4
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value), atol=1e-5, rtol=1e-5)


def test_the_best_blocks_by_hand_are_read_and_neighbours_too() -> None:
    query, key, value = qkv(64, heads=1)
    near = torch.eye(4, dtype=torch.bool)
    output, _ = method("25%", block=16, rectify="none").attend(query, key, value, near=near)
    for b in range(2):
        means = [t[b, 0].view(4, 16, 8).mean(1) for t in (query, key)]
        for i in range(4):
            best = {int((means[0][i] @ means[1].T).argmax()), i}
            slots = torch.cat([torch.arange(16 * j, 16 * j + 16) for j in sorted(best)])
            rows = slice(16 * i, 16 * i + 16)
            expected = scaled_dot_product_attention(query[b, :, rows], key[b][:, slots], value[b][:, slots])
            torch.testing.assert_close(output[b, :, rows], expected, atol=1e-5, rtol=1e-5)


def test_coverage_reads_more_blocks_than_the_budget() -> None:
    query, key, value = qkv(256)
    shares = [method("5%", block=16, coverage=c).attend(query, key, value)[1]["read"] for c in (0.0, 0.5, 0.9, 1.0)]
    assert shares[0] == pytest.approx(1 / 16) and shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.parametrize(("moved", "best"), [(0.0, "all"), (0.2, "gated")])
def test_rectifying_helps_and_the_gain_test_helps_where_blocks_are_impure(moved: float, best: str) -> None:
    query, key, value = clusters(moved)
    dense = scaled_dot_product_attention(query, key, value)
    errors = {}
    for rectify in ("none", "scale", "all", "gated"):
        output, _ = method("5%", block=16, rectify=rectify).attend(query, key, value)
        errors[rectify] = float((output - dense).norm() / dense.norm())
    assert min(errors, key=errors.get) == best, errors
    assert errors["gated"] < errors["none"]


def test_inside_reaches_self_attention_only() -> None:
    query, key, value = qkv(64)
    mask = torch.ones(64, 64, dtype=torch.bool)
    chosen = method(block=16, least=64)
    with chosen.inside() as figures:
        sparse = scaled_dot_product_attention(query, key, value, scale=0.5)
        scaled_dot_product_attention(query, key, value, is_causal=True)
        scaled_dot_product_attention(query, key, value, attn_mask=mask)
        scaled_dot_product_attention(query[:, :, :10], key, value)
        scaled_dot_product_attention(query[:, :, :48], key[:, :, :48], value[:, :, :48])
    assert len(figures) == 1
    torch.testing.assert_close(sparse, chosen.attend(query * 0.5 * 8**0.5, key, value)[0])
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value), method("100%", block=16).attend(query, key, value)[0],
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_inside_a_diffusion_transformer() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the host model is one of diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=32, patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    arguments = {"hidden_states": torch.randn(1, 4, 32, 32), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}
    with torch.no_grad():
        dense = model(**arguments).sample
        with method("100%", block=32, least=256).inside() as figures:
            torch.testing.assert_close(model(**arguments).sample, dense, atol=1e-4, rtol=1e-4)
        assert [row["read"] for row in figures] == [1.0, 1.0]
        with method("25%", block=32, least=256).inside() as figures:
            sparse = model(**arguments).sample
        assert [row["read"] for row in figures] == [0.25, 0.25]
        assert 0 < float((sparse - dense).norm() / dense.norm()) < 0.5
        torch.testing.assert_close(model(**arguments).sample, dense)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(LaconicError, match="rectify must be one of"):
        method(rectify="some")
    with pytest.raises(LaconicError, match="up to 1"):
        method(coverage=2.0)
