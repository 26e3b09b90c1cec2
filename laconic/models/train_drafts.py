"""Train what drafts for a built-in language model: ``python -m laconic.models.train_drafts --model story --data DIR --out DIR``.

It makes the profiles of parallel_prompt_decoding and medusa, of windows of the text that the model itself was trained on. For
other models there is ``laconic profile``, which makes the same of any text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from laconic.models.text_data import Batches, corpus_of, training_texts
from laconic.profiles import make_profile

METHODS = ("parallel_prompt_decoding", "medusa")
TEXTS, LENGTH, STEPS = 2000, 256, 300


def windows(corpus: np.ndarray, seed: int) -> list[torch.Tensor]:
    """``TEXTS`` stretches of ``LENGTH`` token ids; the last eighth is for measuring."""
    return list(torch.from_numpy(Batches(corpus, seed).take(TEXTS, LENGTH)))


def main() -> None:
    """Command line entry."""
    from laconic.models import load

    parser = argparse.ArgumentParser(description="Train the drafters of a built-in language model.")
    parser.add_argument("--model", default="story", help="a built-in model, a local path, or a hub id (default story)")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/books/*.xz and text/technical/*.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the profiles")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default both)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of training (default {STEPS})")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype="float32")
    texts = windows(corpus_of(tokenizer, training_texts(options.data)), options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for method in options.methods.split(","):
        made = make_profile(method, model, texts, options.seed, steps=options.steps)
        made.save(options.out / f"{method}.json")
        print(f"{method}: loss {made.tables['loss'][0]:.3f} to {made.tables['loss'][1]:.3f}")
        for depth, row in enumerate(made.tables["accuracy"], 2):
            print(f"  token {depth}: first guess right {row[0]:.1%}, one of {len(row)} {sum(row):.1%}")


if __name__ == "__main__":
    main()
