"""Train the built-in `story` model and its draft: ``python -m laconic.models.train_story --data DIR --out DIR``.

A Llama that writes English, a little markdown and a little Python, and one of less than a tenth of its size that drafts for it:
``--size draft --teacher DIR`` takes the tokenizer of the first and learns what it would say, not what the text says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from laconic.models import load
from laconic.models.text_data import LIMIT
from laconic.models.train_text import arguments, train

SIZES = {  # hidden size, MLP, layers, query heads, KV heads
    "story": (256, 704, 8, 4, 2),
    "draft": (96, 256, 2, 3, 1),
}


def build_model(tokenizer: Any, size: str = "story"):
    """A Llama of standard architecture with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, layers, heads, kv_heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, max_position_embeddings=LIMIT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def next_token_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of every token but the first of each window."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), ids[:, 1:].flatten())


def likeness_loss(teacher: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Cross-entropy in nats of the model under the teacher's probabilities (Hinton et al. 2015): a draft is accepted where the
    two agree."""

    def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float().softmax(-1)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        return cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), wanted)

    return loss


def main() -> None:
    """Command line entry."""
    options = arguments(
        "Train the built-in story model, or its draft, on CPU.", 90.0,
        size={"choices": sorted(SIZES), "default": "story", "help": "which of the two (default story)"},
        teacher={"type": Path, "help": "folder of the trained story model, to learn from it"},
    )  # fmt: skip
    loss = next_token_loss
    if options.teacher is not None:
        teacher, tokenizer = load(options.teacher, dtype="float32")
        tokenizer.save_pretrained(options.out)
        loss = likeness_loss(teacher)
    train(
        lambda tokenizer: build_model(tokenizer, options.size), loss, options.data, options.out, options.minutes, options.seed,
        options.compile,
    )  # fmt: skip


if __name__ == "__main__":
    main()
