"""Fixtures shared by tests of every folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which torch may do at any time
sys.path.insert(0, str(Path(__file__).parent))  # so that every folder finds tiny.py, whatever the import mode


def build_tokenizer() -> Any:
    """One token per byte, and an end mark: needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1}
    vocabulary |= {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.Split("", "isolated")])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """A random two-layer Llama with grouped queries and its byte tokenizer; nobody may change it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
        bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), build_tokenizer()


@pytest.fixture(scope="session")
def tiny_path(tiny: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model as a directory, as a user has it."""
    path = tmp_path_factory.mktemp("tiny-model")
    for part in tiny:
        part.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of the built-in vision-language architecture, and its processor, on disk."""
    import torch

    from laconic.models.shapes_models import build_model
    from laconic.models.shapes_processor import make_processor

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(path)
    make_processor().save_pretrained(path)
    return str(path)
