"""Real text for haystacks and perplexity, without any download.

The built-in text is the Python language reference that every CPython ships as ``pydoc_data.topics``, about 460 KB of
English. Every second topic is held out: haystacks and perplexity use only those, and the built-in models may be
trained only on the rest.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from laconic.errors import LaconicError


@lru_cache(maxsize=2)
def reference_text(held_out: bool = True) -> str:
    """The held-out (or the training) half of the Python language reference, paragraphs separated by blank lines."""
    from pydoc_data.topics import topics

    names = sorted(topics)[0 if held_out else 1 :: 2]
    return "\n\n".join(topics[name].strip() for name in names)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file (``.xz`` is unpacked). Raises LaconicError if it is missing, not text, or empty."""
    path = Path(path)
    try:
        if path.suffix == ".xz":
            import lzma

            with lzma.open(path, "rt", encoding="utf-8") as file:
                text = file.read()
        else:
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LaconicError(f"The file {path} is not UTF-8 text ({error.reason}); give a plain text file.") from error
    except Exception as error:  # lzma raises its own error class
        reason = getattr(error, "strerror", None) or error
        raise LaconicError(f"The text file {path} cannot be read ({reason}); check the path.") from error
    if not text.strip():
        raise LaconicError(f"The text file {path} is empty; give a file with text in it.")
    return text


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text (split at blank lines), each in one line, empty ones and ruler lines left out."""
    lines = (" ".join(block.split()) for block in text.split("\n\n"))
    return [line for line in lines if sum(map(str.isalpha, line)) > len(line) // 2]


def haystack(tokenizer: Any, tokens: int, rng: random.Random, text: str | Path | None = None) -> list[str]:
    """Consecutive paragraphs of real text, from a random start on, that make about ``tokens`` tokens.

    ``text`` is None for the built-in text or the path of a text file. A text that is too short is repeated. The sum of
    the paragraphs' token counts reaches ``tokens`` and exceeds it by less than one paragraph; no special tokens count.
    """
    pool = _counted_paragraphs(tokenizer, None if text is None else str(text))
    chosen: list[str] = []
    start, total = rng.randrange(len(pool)), 0
    while total < tokens:
        paragraph, count = pool[(start + len(chosen)) % len(pool)]
        chosen.append(paragraph)
        total += count
    return chosen


_POOLS: dict[tuple[int, str | None], tuple[Any, list[tuple[str, int]]]] = {}


def _counted_paragraphs(tokenizer: Any, path: str | None) -> list[tuple[str, int]]:
    key = (id(tokenizer), path)
    if key not in _POOLS:
        pool = paragraphs(reference_text() if path is None else read_text(path))
        if not pool:
            raise LaconicError(f"The text file {path} holds no paragraph of words; give a file with running text.")
        counts = [len(ids) for ids in tokenizer(pool, add_special_tokens=False)["input_ids"]]
        # The tokenizer is kept beside its counts: an id may be reused once an object is gone.
        _POOLS[key] = (tokenizer, list(zip(pool, counts, strict=True)))
    return _POOLS[key][1]
