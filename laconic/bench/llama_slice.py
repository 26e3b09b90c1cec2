"""A slice of a few layers of the Llama-3.2-1B shape with random weights, and caches that are filled instead of prefilled."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def build_slice(quick: bool = False, layers: int = 4) -> torch.nn.Module:
    """The model in fp32 with transformers' sdpa attention; ``quick`` shrinks every width."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    shape: dict[str, Any] = {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    }  # fmt: skip
    if quick:
        shape |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"initializer_range": 0.3}  # so narrow a model would only echo its input otherwise
    config = LlamaConfig(
        **shape, num_hidden_layers=layers, tie_word_embeddings=True, max_position_embeddings=1 << 18,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with no_init_weights():  # half a billion numbers, drawn once and not three times
        model = LlamaForCausalLM(config).eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, config.initializer_range, generator=generator)
            else:
                parameter.fill_(1)  # norms
    return model


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def cache_bytes(config: Any, tokens: int) -> int:
    """Bytes of fp32 keys and values of all layers for ``tokens`` tokens."""
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens


def fill(config: Any, tokens: int, caches: list[Any]) -> None:
    """Puts the same random keys and values of ``tokens`` tokens into every layer of all ``caches``."""
    generator = torch.Generator().manual_seed(1)
    size = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
        for cache in caches:
            cache.update(keys, values, layer)


def stock_cache(config: Any) -> Any:
    """The cache that the model makes for itself."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=config)


def cache_argument(model: torch.nn.Module) -> str:
    """What ``model.forward`` and ``model.generate`` call their cache; it depends on the version of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
