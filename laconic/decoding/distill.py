"""Teaching guesses of later tokens: from many places of a text the frozen model goes on by itself, and that is what to guess."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import kl_div

from laconic.errors import LaconicError
from laconic.hooks import cache_name

WINDOW, WINDOWS = 256, 2  # tokens of a stretch of text, and stretches in a step
PLACES = 64  # of a stretch from which the model goes on
NUMBERS = 1 << 22  # logits of a step, at most: with a large vocabulary there are fewer places
DECAY = 0.8  # weight of each further token in the loss
RANKS = 10  # guesses of a token whose accuracy is measured
HELD_OUT = 8  # one text in so many is for measuring
MEASURED = 32  # steps' worth of places to measure on

Guess = Callable[["Lesson"], torch.Tensor]
"""Logits ``(batch, places, ahead, vocabulary)`` of the tokens 2, 3, ... after each place of a lesson."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """Places in stretches of text, and what the model says there.

    Attributes:
        cuts: int64 ``(batch, places)``: tokens in front of each place.
        hidden: ``(batch, places, hidden)``: last hidden state in front of each place, of which the model's head makes token 1.
        laws: log-probabilities ``(batch, places, ahead, vocabulary)`` of the tokens 2, 3, ..., given the greedy ones before them.
        tokens: number of tokens of each stretch. cache: its keys and values.
    """

    cuts: torch.Tensor
    hidden: torch.Tensor
    laws: torch.Tensor
    tokens: int
    cache: Any

    @property
    def right(self) -> torch.Tensor:
        """int64 ``(batch, places, ahead)``: the greedy tokens."""
        return self.laws.argmax(-1)


@torch.no_grad()
def make_lesson(model: torch.nn.Module, ids: torch.Tensor, cuts: torch.Tensor, ahead: int) -> Lesson:
    """What the model says behind the first ``cuts`` (batch, places) tokens of ``ids`` (batch, n)."""
    from transformers import DynamicCache

    cache, n = DynamicCache(), ids.shape[1]
    held = {cache_name(model): cache, "use_cache": True}
    output = model(input_ids=ids, **held, output_hidden_states=True, logits_to_keep=1)
    hidden = output.hidden_states[-1]
    hidden = hidden.gather(1, (cuts - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
    token, laws = model.get_output_embeddings()(hidden).argmax(-1), []
    for depth in range(ahead):
        logits = _rows(model, {"input_ids": token}, cuts, n, cache, depth)
        laws.append(logits[:, :, 0].float().log_softmax(-1))
        token = laws[-1].argmax(-1)
    cache.crop(-ahead * cuts.shape[1])
    return Lesson(cuts, hidden, torch.stack(laws, dim=2), n, cache)


def with_rows(model: torch.nn.Module, lesson: Lesson, embeddings: torch.Tensor) -> torch.Tensor:
    """Logits ``(batch, places, ahead, vocabulary)`` after ``embeddings`` (ahead, hidden), one after another, at every place."""
    batch, places = lesson.cuts.shape
    rows = embeddings.repeat_interleave(places, 0).expand(batch, -1, -1)
    logits = _rows(model, {"inputs_embeds": rows}, lesson.cuts, lesson.tokens, lesson.cache, 0)
    lesson.cache.crop(-rows.shape[1])
    return logits


def _rows(
    model: torch.nn.Module, rows: dict[str, torch.Tensor], cuts: torch.Tensor, n: int, cache: Any, depth: int
) -> torch.Tensor:
    """Logits ``(batch, places, new, vocabulary)`` of rows behind each place; those of one depth stand together."""
    places = cuts.shape[1]
    given = next(iter(rows.values()))
    new = given.shape[1] // places
    own = torch.arange(depth, depth + new, device=cuts.device)
    positions = (cuts[:, None] + own[:, None]).flatten(1)
    mask = rows_mask(cuts, n, depth, new, model.dtype)
    held = {cache_name(model): cache, "use_cache": True}
    output = model(**rows, **held, attention_mask=mask, position_ids=positions)
    return output.logits.unflatten(1, (new, places)).transpose(1, 2)


def rows_mask(cuts: torch.Tensor, n: int, before: int, new: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the logits of attention, ``(batch, 1, new * places, n + (before + new) * places)``: rows see the text in
    front of their place and the rows of the same place down to their own depth."""
    batch, places = cuts.shape
    text = torch.arange(n, device=cuts.device) < cuts.repeat(1, new)[..., None]
    row = torch.arange(before * places, (before + new) * places, device=cuts.device)[:, None]
    column = torch.arange((before + new) * places, device=cuts.device)
    same = (column % places == row % places) & (column // places <= row // places)
    sees = torch.cat([text, same.expand(batch, -1, -1)], dim=-1)[:, None]
    return torch.zeros(sees.shape, dtype=dtype, device=cuts.device).masked_fill(~sees, torch.finfo(dtype).min)


class Lessons:
    """Random lessons from texts, 1-D token ids; of at least 16 tokens each."""

    def __init__(self, model: torch.nn.Module, texts: Sequence[torch.Tensor], ahead: int, seed: int) -> None:
        if getattr(model.config.get_text_config(), "_attn_implementation", None) not in ("sdpa", "eager"):
            raise LaconicError("Drafts are trained with attn_implementation sdpa or eager: load the model with one of them.")
        self.texts = [text for text in texts if len(text) >= 16]
        if not self.texts:
            raise LaconicError("The texts to train on are too short: give some of 16 tokens or more, better of 256.")
        self.model, self.ahead = model, ahead
        self.window = min(WINDOW, *(len(text) for text in self.texts))
        self.places = max(1, min(PLACES, NUMBERS // (WINDOWS * ahead * model.config.get_text_config().vocab_size)))
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Lesson]:
        while True:
            stretches = [self._stretch() for _ in range(WINDOWS)]
            cuts = self._random(8, self.window + 1, (WINDOWS, self.places))
            device = self.model.device
            yield make_lesson(self.model, torch.stack(stretches).to(device), cuts.to(device), self.ahead)

    def _stretch(self) -> torch.Tensor:
        text = self.texts[int(self._random(0, len(self.texts), ()))]
        start = int(self._random(0, len(text) - self.window + 1, ()))
        return text[start : start + self.window]

    def _random(self, low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, size, generator=self.generator)


def distill(
    model: torch.nn.Module, guess: Guess, parameters: Sequence[torch.nn.Parameter], texts: Sequence[torch.Tensor], *,
    ahead: int, steps: int, rate: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Teaches ``guess``, which ``parameters`` make, what the model says.

    The loss is the mean over depths of 0.8^i KL(model || guess).

    Returns:
        ``accuracy``: see there, on texts kept apart; ``loss``: of the first and of the last tenth of the steps; ``steps``.
    """
    train, test = kept_apart(texts)
    lessons = iter(Lessons(model, train, ahead, seed))

    def loss() -> torch.Tensor:
        lesson = next(lessons)
        apart = kl_div(guess(lesson).float().log_softmax(-1), lesson.laws, reduction="none", log_target=True).sum(-1)
        return (apart.mean((0, 1)) * DECAY ** torch.arange(ahead, device=apart.device)).mean()

    losses = descend(parameters, loss, steps, rate, model.device)
    tenth = max(1, steps // 10)
    ends = [round(sum(part) / tenth, 5) for part in (losses[:tenth], losses[-tenth:])]
    return {"accuracy": accuracy(model, guess, test, ahead, seed), "loss": ends, "steps": steps}


def kept_apart(texts: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Texts to train on and texts to measure on; a single text serves both."""
    if len(texts) == 1:
        return texts, texts
    last = max(1, len(texts) // HELD_OUT)
    return texts[:-last], texts[-last:]


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, guess: Guess, texts: Sequence[torch.Tensor], ahead: int, seed: int
) -> list[list[float]]:
    """``[ahead][ranks]``: how often the guess of each rank is what the model says, falling with the rank."""
    lessons, hits, places = iter(Lessons(model, texts, ahead, seed + 1)), 0, 0
    for _ in range(MEASURED):
        lesson = next(lessons)
        best = guess(lesson).topk(min(RANKS, lesson.laws.shape[-1]), dim=-1).indices
        hits = hits + (best == lesson.right[..., None]).double().sum((0, 1))
        places += lesson.cuts.numel()
    return [[round(share, 5) for share in row] for row in (hits / places).cummin(-1).values.tolist()]


def descend(
    parameters: Sequence[torch.nn.Parameter], loss_of: Callable[[], torch.Tensor], steps: int, rate: float,
    device: torch.device, title: str = "Training",
) -> list[float]:  # fmt: skip
    """Adam with a learning rate that falls to nothing as a cosine, under bf16; gives the losses."""
    from rich.console import Console
    from rich.progress import track

    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in track(range(steps), title, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()):
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
