"""Patches that leave inside the vision encoder: against the definition, block by block, on a tiny CLIP tower."""

from __future__ import annotations

import math

import pytest
import torch
import vlm

import laconic
from laconic.vision.flowcut import FlowCut


def by_hand(model, pixels: torch.Tensor, target: int) -> tuple[list[int], torch.Tensor]:
    """The definition on one picture, written out: kept patches and the features that they have in the end."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels[None]))
    alive, running, last = list(range(64)), None, len(tower.encoder.layers) - 2
    for number, block in enumerate(tower.encoder.layers[: last + 1]):
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        heads = attention.num_heads
        q, k, v = (
            part(normed)[0].unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, n, d)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        a = (q[:, :1] @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)[:, 0, 1:].mean(0)
        g = (v[:, :1] @ v.mT).softmax(-1)[:, 0, 1:].mean(0)
        worth = (a / a.sum() + g / g.sum()) * v.mean(0)[1:].abs().sum(-1)
        hidden = block(hidden, attention_mask=None)
        if number == last:
            break
        running = worth if running is None else (running + worth) / 2
        blocks, n = last - 1 - number, len(alive)
        if blocks % 2:
            continue
        p = a / a.sum()
        entropy = -float(torch.xlogy(p, p).sum()) / math.log(n)
        gone = n - target if blocks == 0 else round((n - target) / math.sqrt(blocks) * (1 - entropy**2))
        keep = running.argsort(descending=True, stable=True)[: n - gone].sort().values
        alive, running = [alive[i] for i in keep.tolist()], running[keep]
        hidden = torch.cat([hidden[:, :1], hidden[:, 1:][:, keep]], dim=1)
    return alive, model.model.multi_modal_projector(hidden[:, 1:])[0]


@pytest.fixture(scope="module")
def deep():
    """A LLaVA whose encoder has seven blocks."""
    import transformers

    config = vlm.config("llava")
    config.vision_config.num_hidden_layers = 7
    torch.manual_seed(1)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(40.0)
    return model


@pytest.mark.parametrize("k", [5, 20, 50])
def test_the_kept_patches_and_their_features_are_those_of_the_definition(deep, k: int) -> None:
    x = vlm.inputs("llava", (1, 2))
    with torch.no_grad(), laconic.apply(deep, f"flowcut:{k}") as handle:
        deep(**x)
        for picture, reduction, pixels in zip(handle.entry.pictures, handle.entry.reductions, x["pixel_values"], strict=True):
            kept, features = by_hand(deep, pixels, k)
            assert reduction.kept.tolist() == kept
            torch.testing.assert_close(picture.features[reduction.kept], features, atol=1e-4, rtol=1e-3)


def test_patches_really_leave_the_encoder(deep) -> None:
    x, widths = vlm.inputs("llava", (1, 2)), []
    hooks = [
        block.mlp.register_forward_hook(lambda _m, args, _out: widths.append(args[0].shape[1]))
        for block in deep.model.vision_tower.encoder.layers
    ]
    with torch.no_grad(), laconic.apply(deep, "flowcut:9"):
        deep(**x)
    for hook in hooks:
        hook.remove()
    assert widths[0] == 65 and widths == sorted(widths, reverse=True)
    assert widths[-2:] == [10, 10] and widths[3] < 65  # the block that gives the features runs on what stays in the end


def test_how_many_leave_follows_the_entropy() -> None:
    method = FlowCut(budget="50%")
    even, one = torch.full((40,), 0.02), torch.zeros(40)
    one[3] = 0.9
    assert method.leaving(40, 10, 4, even) == 0
    assert method.leaving(40, 10, 4, one) == 15  # all 30 over the root of the blocks that are left
    assert method.leaving(40, 10, 3, one) == 0 and method.leaving(40, 10, 0, even) == 30


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(laconic.LaconicError, match="keep one of the two"):
        laconic.apply(vlm.build("llava"), "flowcut:50% + mustdrop:30%")
