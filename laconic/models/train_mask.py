"""Train the built-in diffusion models: ``python -m laconic.models.train_mask --data DIR --out DIR [--size mask-causal]``.

`mask` is a Llama in which everything sees everything, and which fills in masks. `mask-causal` is one with ordinary causal
attention, trained on two streams to fill in masks that stand behind all that is known, as in WeDLM (2025). Both start from a
model that writes from left to right, which already knows how text goes on, as Dream (2025) does; and as there, `mask` says at
each position what comes next, so that a mask is predicted at the position before it. Both learn from windows of text and from
the questions of :mod:`laconic.models.templates`, in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from laconic.models import load
from laconic.models.templates import Documents
from laconic.models.text_data import Batches
from laconic.models.train_text import arguments, train

RATE = 1.5e-3  # of learning: less than from random weights
LEAST = 0.05  # the smallest ratio of masks: its inverse is a token's weight
ROOM = 0.7  # share of the positions of a batch that logits are computed of; batches with more masks than that are rare
BLOCK = 16  # tokens that mask-causal learns to fill at a time
KINDS = {"mask": "masked", "mask-causal": "causal"}  # what config.diffusion says


def build_model(start: str | Path, size: str = "mask") -> tuple[Any, Any]:
    """The model ``start``, a built-in name or a folder, whose config now says that it fills in masks; and its tokenizer."""
    model, tokenizer = load(start, dtype="float32")
    if getattr(model.config, "diffusion", None) is None:
        words = model.get_input_embeddings().weight
        with torch.no_grad():  # the row of a token that was never read says nothing
            words[tokenizer.mask_token_id] = words.mean(0)
    model.config.update({
        "diffusion": KINDS[size], "diffusion_shift": size == "mask", "mask_token_id": tokenizer.mask_token_id,
    })  # fmt: skip
    return model.train(), tokenizer


class Turns:
    """Windows of text and rows of questions in turn, each ``(rows, length)``: ids, which of them may be masked, and where in
    the row each one's document begins."""

    def __init__(self, tokenizer: Any, corpus: np.ndarray, seed: int) -> None:
        self.text, self.documents = Batches(corpus, seed), Documents(tokenizer, seed)
        self.mask, self.rng, self.turn = tokenizer.mask_token_id, np.random.default_rng(seed), 0

    def draw(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Half of ``rows * length`` tokens, in rows of a quarter of the length; every third turn is text.

        Rows are short, and hold short questions only, until the windows of text would be long: more and smaller steps teach more.
        """
        self.turn += 1
        if self.turn % 3 == 0:
            ids = self.text.take(rows * 2, length // 4)
            return ids, np.broadcast_to(np.arange(ids.shape[1]) > 0, ids.shape), np.zeros_like(ids)
        return self.documents.take(rows * 2, length // 4)


class Noise(Turns):
    """What `mask` learns from: ids with masks, where documents begin; and masked positions with their true ids and weights.

    Every row has its ratio of masks t, uniform; a mask weighs 1 / t, which bounds the likelihood (LLaDA, eq. 3). The ratios
    of a batch are spread evenly, which keeps the loss steady. Positions count through all rows; there are always as many, those
    that are not needed with a weight of 0.
    """

    def take(self, rows: int, length: int) -> tuple[np.ndarray, ...]:
        ids, free, begins = self.draw(rows, length)
        spread = (self.rng.permutation(len(ids)) + self.rng.random(len(ids))) / len(ids)
        ratio = np.broadcast_to((LEAST + (1 - LEAST) * spread)[:, None], ids.shape)
        masked = free & (self.rng.random(ids.shape) < ratio)
        order = np.argsort(~masked, axis=None, kind="stable")
        chosen = order[: max(int(ids.size * ROOM), int(masked.sum()))]
        weight = (masked / ratio / free.sum()).flat[chosen]
        return np.where(masked, self.mask, ids), begins, chosen, ids.flat[chosen], weight.astype(np.float32)


def masked_loss(
    model: Any, noisy: torch.Tensor, begins: torch.Tensor, chosen: torch.Tensor, true: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Weighted cross-entropy in nats of the masked tokens, each predicted at the position before it (``diffusion_shift``) or at
    its own; in a document every position sees every other."""
    places = torch.arange(noisy.shape[1]) - begins
    seen = (begins[:, :, None] == begins[:, None])[:, None]
    hidden = model.model(input_ids=noisy, position_ids=places, attention_mask=seen, use_cache=False).last_hidden_state
    source = chosen - int(model.config.diffusion_shift)  # the first position of a row is never masked
    each = cross_entropy(model.lm_head(hidden.flatten(0, 1)[source]).float(), true, reduction="none")
    return (each * weight).sum()


class TwoStreams(Turns):
    """What `mask-causal` learns from: rows ``[true | masked]`` of twice the length.

    Each gives ids, logical positions and, per token of the masked stream, its true id and weight; then, per token of the true
    one, whether it belongs to text or an answer and so is a target; with them comes the mask of who sees whom ``(rows, 1, 2n,
    2n)``. In every block of
    the masked stream what is known stands first, then the masks, at their logical positions. The blocks begin at a random place,
    as the window of decoding does.
    """

    def take(self, rows: int, length: int) -> tuple[np.ndarray, ...]:
        ids, free, begins = self.draw(rows, length)
        rows, length = ids.shape
        block = (np.arange(length) + self.rng.integers(BLOCK)) // BLOCK
        share = np.maximum(self.rng.random((rows, block[-1] + 1)), 1e-8)[:, block]
        rank, count = self._ranks(free, block)
        masked = free & (rank < np.round(share * count))  # round(g * answer tokens of the block) of them, at random
        order = np.argsort(block * 2 + masked, axis=1, kind="stable")
        true = np.take_along_axis(ids, order, 1)
        hidden = np.take_along_axis(masked, order, 1)
        weight = hidden / np.take_along_axis(share, order, 1)
        weight /= max(weight.sum(), 1e-8)
        stream = np.concatenate([ids, np.where(hidden, self.mask, true)], 1)
        begins = np.concatenate([begins, np.take_along_axis(begins, order, 1)], 1)
        places = np.concatenate([np.broadcast_to(np.arange(length), order.shape), order], 1) - begins
        seen = two_stream_mask(block) & (begins[:, :, None] == begins[:, None])[:, None]
        return stream, places, true, weight.astype(np.float32), free, seen

    def _ranks(self, free: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A random rank of every maskable token among those of its block, and how many these are."""
        noise = np.where(free, self.rng.random(free.shape), 2.0)
        order = np.argsort(block * 4 + noise, axis=1)
        first = np.searchsorted(block, block)
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(len(block)), order.shape) - first, 1)
        totals = np.add.reduceat(free, np.unique(first), axis=1)
        return rank, totals[:, block]


def two_stream_mask(block: np.ndarray) -> np.ndarray:
    """Who sees whom in ``[true | masked]``, bool (1, 1, 2n, 2n), for the block of every position (n).

    The true stream is causal; a token of the masked one sees the true tokens of earlier blocks and, in its own block, the
    masked stream up to itself.
    """
    length = len(block)
    causal = np.tril(np.ones((length, length), dtype=bool))
    same = block[:, None] == block[None]
    lower = np.concatenate([block[:, None] > block[None], causal & same], 1)
    return np.concatenate([np.concatenate([causal, np.zeros_like(causal)], 1), lower])[None, None]


def two_stream_loss(
    model: Any, stream: torch.Tensor, places: torch.Tensor, true: torch.Tensor, weight: torch.Tensor, free: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Half the weighted cross-entropy of the masks, half that of the next token in the true stream, in nats."""
    length = true.shape[1]
    hidden = model.model(
        input_ids=stream, position_ids=places, attention_mask=seen, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden).float()
    masks = cross_entropy(logits[:, length:].flatten(0, 1), true.flatten(), reduction="none")
    next_one = cross_entropy(logits[:, : length - 1].flatten(0, 1), stream[:, 1:length].flatten(), reduction="none")
    wanted = free[:, 1:].flatten().float()
    return 0.5 * (masks * weight.flatten()).sum() + 0.5 * (next_one * wanted).sum() / wanted.sum()


def main() -> None:
    """Command line entry."""
    options = arguments(
        "Train a built-in diffusion model on CPU.", 45.0,
        size={"choices": sorted(KINDS), "default": "mask", "help": "which of the two (default mask)"},
        start={"default": "story", "help": "name or folder of the model to start from (default story)"},
    )  # fmt: skip
    feed, loss_of = (Noise, masked_loss) if options.size == "mask" else (TwoStreams, two_stream_loss)
    model, tokenizer = build_model(options.start, options.size)
    tokenizer.save_pretrained(options.out)
    train(
        lambda _: model, loss_of, options.data, options.out, options.minutes, options.seed, options.compile, feed=feed, rate=RATE
    )


if __name__ == "__main__":
    main()
