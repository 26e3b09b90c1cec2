"""The small byte-level BPE tokenizer of the built-in models: any text, 1,536 pieces, and the code names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from laconic.models.names import code_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
PIECES = 1536


def train_tokenizer(texts: Iterable[str], pieces: int = PIECES) -> PreTrainedTokenizerFast:
    """Train byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) and add every code name as one token.

    ``pieces`` counts the special tokens, the 256 bytes and the merges; the names come on top. Pads on the left.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    # The leading space belongs to the token, as in the pieces of byte-level BPE.
    core.add_tokens([AddedToken(" " + name, normalized=False) for name in code_names()])
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        model_max_length=16384,
        clean_up_tokenization_spaces=False,
    )
