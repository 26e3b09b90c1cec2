"""Byte-level BPE tokenizers of the built-in models (Sennrich et al. 2016, on bytes as in GPT-2): any text, no unknown token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def train_pieces(texts: Iterable[str], pieces: int, special: Sequence[str]) -> Tokenizer:
    """A tokenizer of ``pieces`` tokens: the special ones first, the 256 bytes, and the merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=pieces, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False)
    )
    return core


def wrapped(core: Tokenizer, limit: int, **special: str) -> PreTrainedTokenizerFast:
    """As transformers wants it: pads on the left, takes texts of ``limit`` tokens. ``special``: pad_token, bos_token, ..."""
    from transformers import PreTrainedTokenizerFast

    options: dict[str, Any] = {"padding_side": "left", "model_max_length": limit, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special, **options)
