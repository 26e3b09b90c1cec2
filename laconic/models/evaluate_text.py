"""How well a model writes, for its card: ``python -m laconic.models.evaluate_text --model story --data DIR``.

Bits per byte on text that the built-in models were not trained on: the ends of books and technical documents, modules of the
Python standard library, and the test split of WikiText-2. Plain transformers, nothing of Laconic's cache.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from laconic.evaluation.haystack import read_text
from laconic.models import load
from laconic.models.text_data import held_out_text, python_sources

WINDOW = 1024  # tokens that are read at once; of all but the first window the second half is judged
CODE = 400_000  # characters of Python


def texts(data: Path) -> Iterator[tuple[str, str]]:
    """Names and texts: books, technical, python, wikitext-2."""
    for kind in ("books", "technical"):
        yield kind, "".join(held_out_text(path) for path in sorted((data / "text" / kind).glob("*.xz")))
    code = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in python_sources()[::7])
    yield "python", code[:CODE]
    yield "wikitext-2 test", read_text(data / "text" / "wikitext-2" / "test.txt.xz")


@torch.inference_mode()
def judge(model: Any, tokenizer: Any, text: str) -> dict[str, float]:
    """Bits per byte, perplexity per token, and the share of tokens that are the model's first choice."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    begin = torch.tensor([tokenizer.bos_token_id])
    nats = right = count = 0.0
    for start in range(0, len(ids), WINDOW // 2):
        first = 0 if start == 0 else WINDOW // 2  # tokens that are context only
        window = torch.cat([begin, ids[max(0, start - first) : start + WINDOW // 2]])
        logits = model(input_ids=window[None], use_cache=False).logits[0, first:-1].float()
        target = window[first + 1 :]
        nats += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        right += float((logits.argmax(-1) == target).sum())
        count += len(target)
    size = len(text.encode())
    return {
        "bits_per_byte": nats / math.log(2) / size, "perplexity": math.exp(nats / count), "first_choice": right / count,
        "bytes": size, "tokens": int(count),
    }  # fmt: skip


def main() -> None:
    """Command line entry; prints JSON."""
    parser = argparse.ArgumentParser(description="Bits per byte of a model on held-out text.")
    parser.add_argument("--model", default="story")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/{books,technical,wikitext-2}/*.xz")
    parser.add_argument("--limit", type=int, default=None, help="characters of each text; by default all")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    print(json.dumps({name: judge(model, tokenizer, text[: options.limit]) for name, text in texts(options.data)}, indent=2))


if __name__ == "__main__":
    main()
