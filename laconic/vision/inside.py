"""Base of the methods that drop picture tokens between layers of the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.primitives.scores import attention_received, capped
from laconic.vision.encoder import Want
from laconic.vision.select import top


@dataclass(frozen=True, kw_only=True)
class InsideMethod(AttentionMethod):
    """Drops picture tokens on their way up: layers after the drop neither compute nor hold them; those before hold all.

    The budget is a share or a number of each picture's tokens. A subclass writes ``stays``, how many are left after which
    layers, and ``worth``. Words and separators always go on.
    """

    stage: ClassVar[str] = "vision"
    verbs: ClassVar[tuple[str, ...]] = ("drop",)
    claims: ClassVar[tuple[Claim, ...]] = (Claim("random_prune"), Claim("uniform"))
    shortens: ClassVar[bool] = True

    def check(self) -> None:
        self.require(self.budget.shape == "uniform", "it says itself what each layer keeps: leave out 'pyramid:'.")

    def wants(self, depth: int) -> set[Want]:
        """What the attention of a vision encoder of ``depth`` blocks is asked for."""
        return set()

    def stays(self, n: int, layers: int) -> dict[int, int]:
        """After which layers, counted from 0, how many of a picture's ``n`` tokens are left."""
        raise NotImplementedError

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Worth of every entry of the layer, float ``(batch, n)``; higher stays. Asked only in layers of ``stays``."""
        raise NotImplementedError

    def watch(self, layer: KVLayer, call: Call) -> None:
        """Called in every layer of a prompt with pictures: the place to add up."""

    def leave(self, layer: KVLayer, call: Call) -> None:
        number = picture_numbers(layer)
        if number is None or self.budget.is_full:
            return
        self.watch(layer, call)
        if layer.index == layer.layers - 1:
            return
        stays, worth = torch.ones_like(number, dtype=torch.bool), None
        for picture in number.unique().tolist():
            left = {} if picture < 0 else self.stays(int((layer.request.pictures == picture).sum()), layer.layers)
            if layer.index not in left:
                continue
            worth = self.worth(layer, call) if worth is None else worth
            row = int((number == picture).any(-1).nonzero()[0])
            slots = (number[row] == picture).nonzero()[:, 0]
            if left[layer.index] < len(slots):
                stays[row, slots] = False
                stays[row, top(worth[row], left[layer.index], slots)] = True
        if worth is not None:
            self.go_on(layer, stays)

    def go_on(self, layer: KVLayer, stays: torch.Tensor) -> None:
        """Only the entries that ``stays`` (batch, n) names go on to deeper layers, as far as they are of this forward."""
        positions, new = layer.shared_positions[:, 0], layer.request.positions
        living = positions.masked_fill(~stays, -1).sort(dim=-1).values
        living = living.masked_fill(living < new.masked_fill(new < 0, new.max()).amin(-1, keepdim=True), -1)
        layer.request.onward = living[:, int((living < 0).sum(-1).min()) :]


def picture_numbers(layer: KVLayer) -> torch.Tensor | None:
    """Which picture each entry of the layer belongs to, int64 ``(batch, n)``, -1 for words; None where no picture comes in."""
    pictures = layer.request.pictures
    if pictures is None:
        return None
    positions = layer.shared_positions[:, 0]
    number = pictures.gather(1, positions.clamp(min=0, max=pictures.shape[1] - 1))
    return number.masked_fill((positions < 0) | (positions >= pictures.shape[1]), -1)


def attention_of_last(layer: KVLayer, call: Call, rows: int = 1) -> torch.Tensor:
    """Attention that every entry receives from the last ``rows`` tokens, ``(batch, n)``: mean over heads, summed over tokens."""
    received = attention_received(
        call.query[:, :, -rows:], layer.keys, scale=call.scale, softcap=call.softcap, starts=layer.starts(), window=call.window
    )
    return received.mean(1)


def attention_of_words(layer: KVLayer, call: Call, row: int, picture: int) -> torch.Tensor:
    """Attention that each of the words behind a picture gives, ``(words, n)`` of one row: mean over heads, over all entries.

    There are few words beside the many picture tokens, so that this is no map of all against all.
    """
    number = picture_numbers(layer)[row]
    first = int((number == picture).nonzero()[-1]) + 1
    rows = torch.arange(first, layer.n, device=number.device)
    rows = rows[number[rows] < 0]
    own = rows - (layer.n - call.query.shape[2])  # among the tokens of this forward
    query = call.query[row, :, own].float().unflatten(0, (layer.heads, -1))
    logits = torch.einsum("kgwd,knd->kgwn", query, layer.keys[row].float()) * call.scale
    seen = (torch.arange(layer.n, device=rows.device) <= rows[:, None]) & (layer.shared_positions[row, 0] >= 0)
    if call.window is not None:
        at = layer.shared_positions[row, 0]
        seen &= at > at[rows][:, None] - call.window
    return capped(logits, call.softcap).masked_fill(~seen, float("-inf")).softmax(-1).mean((0, 1))


def by_words(layer: KVLayer, call: Call, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``reduce`` of ``attention_of_words`` over the words, for every picture's own entries: float ``(batch, n)``, 0 elsewhere."""
    numbers = picture_numbers(layer)
    worth = torch.zeros(numbers.shape, device=numbers.device)
    for picture in numbers.unique().tolist():
        if picture >= 0:
            row = int((numbers == picture).any(-1).nonzero()[0])
            own = numbers[row] == picture
            worth[row, own] = reduce(attention_of_words(layer, call, row, picture))[own]
    return worth
