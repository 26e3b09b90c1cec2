"""Fine-tune a model for lexical unit decoding:
``python -m laconic.models.train_lexical_units --model story --data DIR --out DIR``.

A lexical unit is a run of tokens of which the model is sure: it gives each at least ``--sure``. Behind the text in front of a
unit stand PAD tokens in the place of its own, and the model learns to say it as a whole, beside the text itself (Decoding at the
Speed of Thought, 2024). The PAD token is the tokenizer's, and otherwise one that is added.

It takes long. After 120 steps of half a batch, `story` says 1.04 tokens in a forward with confidence 0.5, next to none above, and
pays for it with 0.10 to 0.15 nats a token of held-out text: this falls short of the 1.3 tokens that one would expect.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from laconic.decoding.distill import descend, rows_mask
from laconic.decoding.lexical_unit_decoding import MARK
from laconic.models.text_data import Batches, corpus_of, training_texts

MOST = 4  # tokens of a unit
SURE = 0.9
RATE, STEPS = 5e-4, 600
WINDOW, WINDOWS, PLACES = 256, 8, 32  # tokens of a stretch of text, stretches of a step, units of a stretch


def units(sure: torch.Tensor, most: int) -> torch.Tensor:
    """Length of the unit that begins at each token, int64 ``(batch, n)``; 0 where none does.

    Args:
        sure: boolean ``(batch, n)``. Runs of more than ``most`` tokens are cut into several units.
    """
    at = torch.arange(sure.shape[1], device=sure.device).expand(sure.shape)
    before = at.masked_fill(sure, -1).cummax(-1).values  # the last token that is not sure
    begins = sure & ((at - before - 1) % most == 0)
    length, going = begins.long(), begins
    for offset in range(1, most):
        going = going & torch.nn.functional.pad(sure[:, offset:], (0, offset))
        length = length + going
    return length


def choose_units(lengths: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ``places`` random units of two tokens or more begin, and how long they are, ``(batch, places)``; 0 for none."""
    worth = torch.rand(lengths.shape, device=lengths.device).masked_fill(lengths < 2, -1.0)
    worth[:, 0] = -1.0
    chosen = worth.topk(places, dim=-1)
    return chosen.indices.clamp(min=1), lengths.gather(1, chosen.indices).masked_fill(chosen.values < 0, 0)


def unit_loss(
    model: Any, teacher: Any, ids: torch.Tensor, *, pad: int, most: int = MOST, sure: float = SURE, places: int = PLACES
) -> torch.Tensor:
    """Mean cross-entropy in nats of the text, plus that of the tokens of units that PAD rows have to say.

    Args:
        ids: int64 ``(batch, n)``; teacher: the model before training, which marks the units.
    """
    n = ids.shape[1]
    with torch.no_grad():
        law = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float().softmax(-1)
        known = law.gather(2, ids[:, 1:, None])[..., 0] >= sure
    cuts, lengths = choose_units(units(torch.nn.functional.pad(known, (1, 0)), most), min(places, n))
    offset = torch.arange(most - 1, device=ids.device).repeat_interleave(cuts.shape[1])  # rows of one depth stand together
    embed = model.get_input_embeddings()
    rows = embed(torch.full((len(ids), len(offset)), pad, device=ids.device))
    at = cuts.repeat(1, most - 1) + offset
    text = torch.arange(n, device=ids.device).expand(len(ids), -1)
    embeddings, positions = torch.cat([embed(ids), rows], dim=1), torch.cat([text, at], dim=1)
    mask = training_mask(cuts, n, most - 1, model.dtype)
    output = model(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False)
    logits = output.logits.float()
    loss = cross_entropy(logits[:, : n - 1].flatten(0, 1), ids[:, 1:].flatten())
    inside = offset < lengths.repeat(1, most - 1) - 1
    said, right = logits[:, n:][inside], ids.gather(1, (at + 1).clamp(max=n - 1))[inside]
    return loss + cross_entropy(said, right) if len(right) else loss


def training_mask(cuts: torch.Tensor, n: int, depths: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention's logits, ``(batch, 1, n + rows, n + rows)``: the text is causal and blind to the rows."""
    below = rows_mask(cuts, n, 0, depths, dtype)
    least = torch.finfo(dtype).min
    above = torch.full((n, below.shape[-1]), least, dtype=dtype, device=cuts.device).triu(1)
    above[:, n:] = least
    return torch.cat([above.expand(len(cuts), 1, -1, -1), below], dim=2)


def fine_tune(
    model: Any, corpus: np.ndarray, *, pad: int, steps: int = STEPS, rate: float = RATE, seed: int = 0, most: int = MOST,
    sure: float = SURE, window: int = WINDOW,
) -> Sequence[float]:  # fmt: skip
    """Trains ``model`` in place on a text of token ids and marks its configuration; gives the losses."""
    torch.manual_seed(seed)
    teacher = copy.deepcopy(model).requires_grad_(False)
    embed, batches = model.get_input_embeddings(), Batches(corpus, seed)
    embed.padding_idx = None  # else the PAD token would learn nothing

    def loss() -> torch.Tensor:
        ids = torch.from_numpy(batches.take(WINDOWS, window)).to(model.device)
        return unit_loss(model, teacher, ids, pad=pad, most=most, sure=sure)

    losses = descend(list(model.parameters()), loss, steps, rate, model.device, "Fine-tuning")
    setattr(model.config, MARK, {"pad": pad, "most": most, "sure": sure, "steps": steps})
    return losses


def pad_token(model: Any, tokenizer: Any) -> int:
    """The tokenizer's PAD token; where there is none, or it ends texts, too, a new one."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer.pad_token_id


def main() -> None:
    """Command line entry."""
    from laconic.models import load

    parser = argparse.ArgumentParser(description="Fine-tune a language model for lexical unit decoding.")
    parser.add_argument("--model", default="story", help="a built-in model, a local path, or a hub id (default story)")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/books/*.xz and text/technical/*.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--most", type=int, default=MOST, help=f"tokens of a unit at most (default {MOST})")
    parser.add_argument("--sure", type=float, default=SURE, help=f"probability of each token of a unit (default {SURE})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of training (default {STEPS})")
    parser.add_argument("--rate", type=float, default=RATE, help=f"learning rate (default {RATE})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype="float32")
    pad = pad_token(model, tokenizer)
    corpus = corpus_of(tokenizer, training_texts(options.data))
    losses = fine_tune(
        model, corpus, pad=pad, steps=options.steps, rate=options.rate, seed=options.seed, most=options.most, sure=options.sure
    )
    tenth = max(1, len(losses) // 10)
    print(f"Loss of the first and last tenth of the steps: {np.mean(losses[:tenth]):.3f}, {np.mean(losses[-tenth:]):.3f}")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
