"""Tiny random models of nine architectures, and prompts for them: small enough to build in a test."""

from __future__ import annotations

import functools
from typing import Any

import torch

VOCABULARY = 97
WINDOW = 12  # tokens of the sliding windows


def _sizes(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None, **changes,
    }  # fmt: skip


# name: (config class, model class, what differs)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"num_key_value_heads": 4}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": WINDOW}),
}


def build(name: str = "llama", *, sharpen: float = 4.0, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A new random model in eval mode that never stops early.

    ``sharpen`` multiplies the weight matrices: with the usual small weights attention is nearly uniform, and every
    method would pass.
    """
    import transformers

    config_name, model_name, differs = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**_sizes(**{**differs, **changes}))
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharpen)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def shared(name: str = "llama") -> torch.nn.Module:
    """The same model for every test that leaves it as it was."""
    return build(name)


def prompt(rows: int = 1, length: int = 40, *, seed: int = 0, pads: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Random ``input_ids`` and ``attention_mask`` (rows, length), with ``pads`` tokens of padding on the left."""
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tokens: int, **options: Any) -> Any:
    """``model.generate``, greedy unless ``options`` say otherwise."""
    return model.generate(**inputs, max_new_tokens=tokens, **{"do_sample": False, **options})
