"""What the built-in `shapes` models are made of, and how one starts from the weights of another.

`shapes` has CLIP's encoder, `shapes-siglip` SigLIP's, which has no class token, and `shapes-merger` that of Idefics3 and SmolVLM:
SigLIP's, of which a square of patches becomes one token. The language model is the same Llama.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from laconic.errors import LaconicError, quote
from laconic.models import load
from laconic.models.pictures import Eyes, find_eyes
from laconic.models.scenes import CELL, SIDE, make_scene
from laconic.models.shapes_processor import MERGE, VARIANTS, make_processor, vocabulary
from laconic.vision.encoder import has_class_token

EYES = {
    "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 3, "image_size": SIDE, "patch_size": CELL,
}  # fmt: skip
SEEN = 24  # scenes on which a start is fitted
RIDGE = 1e-3


def build_model(variant: str = "shapes") -> Any:
    """A model of standard architecture with random weights: a vision tower, a projector, a Llama. ``variant``: of VARIANTS."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(_config(variant))
    eyes = find_eyes(model)
    with torch.no_grad():
        eyes.language.embed_tokens.weight.normal_(0.0, 1.0)
        # louder than usual: patches of high contrast get loud while learning, and would drown where they lie
        patches = eyes.tower.embeddings.position_embedding.weight[-((SIDE // CELL) ** 2) :]
        patches.copy_(2.5 * grid_positions(SIDE // CELL, EYES["hidden_size"]))
        for weight in eyes.projector.parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 0.05 if variant == "shapes-merger" else 0.12)  # pictures come in as loud as words
        for layer in eyes.tower.encoder.layers:  # the usual starts are made for much wider models
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.fc1):
                linear.weight.normal_(0.0, 0.08)
    return model


def _config(variant: str) -> Any:
    import transformers as hf

    names = vocabulary(variant)
    image = names.index("<image>")
    text = hf.LlamaConfig(
        vocab_size=len(names), hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, initializer_range=0.09, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # so that most dimensions tell what, not where
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if variant == "shapes-merger":
        vision = hf.Idefics3VisionConfig(**EYES, num_hidden_layers=4)
        return hf.Idefics3Config(
            vision_config=vision, text_config=text, image_token_id=image, scale_factor=MERGE, tie_word_embeddings=False,
            pad_token_id=0,
        )  # fmt: skip
    llava = {
        "text_config": text, "image_token_index": image, "image_seq_length": (SIDE // CELL) ** 2, "tie_word_embeddings": False,
    }  # fmt: skip
    if variant == "shapes-siglip":
        vision = hf.SiglipVisionConfig(**EYES, num_hidden_layers=4, vision_use_head=False)
        return hf.LlavaConfig(vision_config=vision, vision_feature_layer=-1, vision_feature_select_strategy="full", **llava)
    vision = hf.CLIPVisionConfig(**EYES, num_hidden_layers=5, projection_dim=96)
    return hf.LlavaConfig(vision_config=vision, vision_feature_layer=-2, vision_feature_select_strategy="default", **llava)


def grid_positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of both coordinates, ``(side * side, width)``: what position embeddings start from."""
    rates = torch.exp(torch.arange(width // 4) * (-np.log(100.0) / (width // 4)))
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, -1)


@torch.no_grad()
def warm_start(model: Any, variant: str, start: str, seed: int = 0) -> None:
    """Gives ``model``, of ``build_model(variant)``, the weights of ``start``: a `shapes` model, built in or in a folder.

    What both have is copied. An encoder without class token takes over the blocks of one that has it, and into its embeddings
    what the layer norm in front of those blocks did, though divided by the mean deviation instead of each patch's own. A merger
    is fitted, by ridge regression on rendered scenes, to the mean of the tokens that ``start`` makes of its patches.

    Raises:
        LaconicError: the parts of ``start`` do not fit: it is neither ``variant`` nor one that stands before it in VARIANTS.
    """
    known, reader = load(start)
    _check_start(known.config, variant, start)
    old, new = find_eyes(known), find_eyes(model)
    pictures = [make_scene(np.random.default_rng(seed + i)).render() for i in range(SEEN)]
    before, after = (p.image_processor(pictures, return_tensors="pt") for p in (reader, make_processor(variant)))
    if has_class_token(old.tower) and not has_class_token(new.tower):
        _fold(old.tower, new.tower, before["pixel_values"], reader.image_processor, make_processor(variant).image_processor)
    else:
        new.tower.load_state_dict(old.tower.state_dict())
    if type(old.projector) is type(new.projector):
        new.projector.load_state_dict(old.projector.state_dict())
    else:
        tokens = torch.stack(list(old.inner.get_image_features(before["pixel_values"]).pooler_output))
        _fit_merger(new, after["pixel_values"], tokens)
    new.language.layers.load_state_dict(old.language.layers.state_dict())
    new.language.norm.load_state_dict(old.language.norm.state_dict())
    words = len(old.language.embed_tokens.weight)
    new.language.embed_tokens.weight[:words] = old.language.embed_tokens.weight
    model.lm_head.weight[:words] = known.lm_head.weight


def _check_start(config: Any, variant: str, start: str) -> None:
    """Refuses a model whose parts do not fit into those of ``variant``."""

    def kind(config: Any) -> tuple[Any, ...]:
        vision, text = getattr(config, "vision_config", None), config.get_text_config()
        sizes = (getattr(vision, name, None) for name in ("hidden_size", "image_size", "patch_size"))
        return type(config), type(vision), *sizes, text.model_type, text.hidden_size, text.num_hidden_layers

    fitting = VARIANTS[: VARIANTS.index(variant) + 1]
    if kind(config) not in [kind(_config(name)) for name in fitting]:
        known = " or ".join(fitting)
        raise LaconicError(f"{variant} cannot start from {quote(start)}: give {known}, or a folder that holds such a model.")


def _fold(old: Any, new: Any, pixels: torch.Tensor, reader: Any, other: Any) -> None:
    """CLIP's ``old`` tower in the form of SigLIP's. ``pixels``: as ``reader`` prepares scenes; ``other`` is the new tower's."""
    for name in ("layer_norm1", "self_attn", "layer_norm2", "mlp"):
        for block, before in zip(new.encoder.layers, old.encoder.layers, strict=False):
            getattr(block, name).load_state_dict(getattr(before, name).state_dict())
    parts, norm = old.embeddings, old.pre_layrnorm
    places = parts.position_embedding.weight[1:]
    loud = (parts.patch_embedding(pixels).flatten(2).transpose(1, 2) + places).std(-1, correction=0).mean()
    scale = norm.weight / loud
    kernel = scale[:, None, None, None] * (parts.patch_embedding.weight - parts.patch_embedding.weight.mean(0))
    mean, std, own_mean, own_std = (
        torch.tensor(value).view(1, -1, 1, 1)
        for value in (reader.image_mean, reader.image_std, other.image_mean, other.image_std)
    )
    new.embeddings.patch_embedding.weight.copy_(kernel * own_std / std)
    new.embeddings.patch_embedding.bias.copy_((kernel * (own_mean - mean) / std).sum((1, 2, 3)))
    new.embeddings.position_embedding.weight.copy_(scale * (places - places.mean(-1, keepdim=True)) + norm.bias)


def _fit_merger(eyes: Eyes, pixels: torch.Tensor, tokens: torch.Tensor) -> None:
    """``pixels``: of scenes (1, scenes, 3, side, side); ``tokens``: of each of their patches (scenes, patches, dim)."""
    given: list[torch.Tensor] = []
    linear = eyes.projector.modality_projection.proj
    hook = linear.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    eyes.inner.get_image_features(pixels)
    hook.remove()
    side = SIDE // CELL // MERGE
    wanted = tokens.view(len(tokens), side, MERGE, side, MERGE, -1).mean((2, 4)).flatten(0, 2)
    seen = given[0].flatten(0, 1)
    square = seen.T @ seen
    damped = square + RIDGE * square.diagonal().mean() * torch.eye(len(square))
    linear.weight.copy_(torch.linalg.solve(damped, seen.T @ wanted).T)
