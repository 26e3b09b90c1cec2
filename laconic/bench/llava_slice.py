"""A four-layer slice of LLaVA-1.5-7B's shape with random weights: its whole vision encoder, four layers of its language model."""

from __future__ import annotations

from typing import Any

import torch

IMAGE = 31_999  # id of the token that pictures take the place of
TEXT = 40  # words of a prompt


def build_slice(quick: bool = False) -> torch.nn.Module:
    """The model in fp32 with sdpa attention; ``quick`` shrinks every width and the pictures."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    eyes: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
        "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    text: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32}
    if quick:
        eyes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 84}
        text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    language = LlamaConfig(
        **text, vocab_size=32_000, num_hidden_layers=4, max_position_embeddings=8192, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(vision_config=CLIPVisionConfig(**eyes), text_config=language, image_token_index=IMAGE)
    config._attn_implementation = "sdpa"
    with no_init_weights():  # a billion numbers, drawn once
        model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)  # norms, and biases with them
    return model


def prompt(model: torch.nn.Module, pictures: int) -> dict[str, torch.Tensor]:
    """A prompt of ``pictures`` pictures of noise and some words behind them."""
    eyes = model.config.vision_config
    generator = torch.Generator().manual_seed(1)
    tokens = pictures * (eyes.image_size // eyes.patch_size) ** 2
    words = torch.randint(3, 1000, (TEXT,), generator=generator)
    ids = torch.cat([torch.tensor([1]), torch.full((tokens,), IMAGE), words])[None]
    pixels = torch.randn(pictures, 3, eyes.image_size, eyes.image_size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
