"""The small byte-level BPE tokenizer of the built-in models: any text, 1,536 pieces, and the code names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from laconic.models.byte_bpe import train_pieces, wrapped
from laconic.models.names import code_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
PIECES = 1536


def train_tokenizer(texts: Iterable[str], pieces: int = PIECES) -> PreTrainedTokenizerFast:
    """Train byte-level BPE and add every code name as one token.

    ``pieces`` counts the special tokens, the 256 bytes and the merges; the names come on top.
    """
    from tokenizers import AddedToken

    core = train_pieces(texts, pieces, SPECIAL_TOKENS)
    # The leading space belongs to the token, as in the pieces of byte-level BPE.
    core.add_tokens([AddedToken(" " + name, normalized=False) for name in code_names()])
    pad, bos, eos = SPECIAL_TOKENS
    return wrapped(core, 16384, pad_token=pad, bos_token=bos, eos_token=eos)
