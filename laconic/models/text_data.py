"""Text that the built-in language models learn to write: books, technical documents, Python code; a part is held out of each.

Held out for measuring are the last 5 % of every book and document, every second module of the Python standard library, every
second topic of the Python language reference, and WikiText-2 as a whole.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laconic.errors import LaconicError
from laconic.evaluation.haystack import read_text, reference_text
from laconic.models.byte_bpe import train_pieces, wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT = 0.05  # share of each document, at its end
PIECES = 4096  # tokens of the vocabulary, the special ones included
SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>")
LIMIT = 2048  # positions of the models
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "pydoc_data"}  # of the standard library
SHARD = 100_000  # characters that are tokenized at a time


def python_sources(held_out: bool = True) -> list[Path]:
    """Modules of the standard library of the running Python: every second one is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    return files[0 if held_out else 1 :: 2]


def training_texts(data: Path) -> list[str]:
    """What may be learned: the kept parts of ``data/text/{books,technical}/*.xz``, of the standard library and its reference."""
    files = sorted(path for kind in ("books", "technical") for path in (data / "text" / kind).glob("*.xz"))
    if not files:
        raise LaconicError(f"{data} holds no text: give a folder with text/books/*.xz or text/technical/*.xz.")
    documents = [_split(read_text(path))[0] for path in files]
    code = [path.read_text(encoding="utf-8", errors="ignore") for path in python_sources(held_out=False)]
    return [*documents, *filter(str.strip, code), reference_text(held_out=False)]


def held_out_text(path: Path) -> str:
    """The end of a document that no model was trained on."""
    return _split(read_text(path))[1]


def _split(text: str) -> tuple[str, str]:
    """The part of a text to learn from, and its end."""
    cut = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1
    return text[:cut], text[cut:]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``PIECES`` tokens that puts <bos> in front."""
    from tokenizers import processors

    core = train_pieces(texts, PIECES, SPECIAL)
    pad, bos, eos, mask = SPECIAL
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return wrapped(core, LIMIT, pad_token=pad, bos_token=bos, eos_token=eos, mask_token=mask)


def prepare(data: Path, out: Path) -> tuple[Any, np.ndarray]:
    """The tokenizer, trained once and then read from ``out``, and all of the text as one array of token ids.

    Every document begins with <bos> and ends with <eos>.
    """
    from transformers import AutoTokenizer

    texts = training_texts(data)
    if (out / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(out)
    else:
        tokenizer = train_tokenizer(text[:1_000_000] for text in texts)
        tokenizer.save_pretrained(out)
    return tokenizer, corpus_of(tokenizer, texts)


def corpus_of(tokenizer: Any, texts: Iterable[str]) -> np.ndarray:
    """All of the texts as one array of token ids, int32."""
    return np.concatenate([encode(tokenizer, text) for text in texts])


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a whole document, int32, with the tokens that begin and end a text where the tokenizer has them."""
    pieces = [text[i : i + SHARD] for i in range(0, len(text), SHARD)]
    ids = [i for part in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] for i in part]
    whole = (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)
    return np.array([i for i in whole if i is not None], dtype=np.int32)


class Batches:
    """Random windows of the text, ``(rows, length)`` int64."""

    def __init__(self, corpus: np.ndarray, seed: int) -> None:
        self.corpus, self.rng = corpus, np.random.default_rng(seed)

    def take(self, rows: int, length: int) -> np.ndarray:
        starts = self.rng.integers(0, len(self.corpus) - length, rows)
        return self.corpus[starts[:, None] + np.arange(length)].astype(np.int64)
