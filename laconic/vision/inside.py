"""Base of the methods that drop picture tokens between layers of the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call
from laconic.buffers import locate
from laconic.cache import WORD, KVLayer, Request
from laconic.claims import Claim
from laconic.kernels.ragged import dense
from laconic.method import parameter
from laconic.primitives.merge import Merge
from laconic.primitives.scores import attention_received, capped
from laconic.vision.base import PICTURE_CLAIMS
from laconic.vision.encoder import Want
from laconic.vision.schedule import falling, thinned
from laconic.vision.select import top


@dataclass(frozen=True, kw_only=True)
class InsideMethod(AttentionMethod):
    """Drops picture tokens on their way up: layers after the drop neither compute nor hold them; those before hold all.

    The budget is a share or a number of each picture's tokens, those among them that never reach the first layer. A subclass
    writes ``stays``, how many are left after which layers, and ``worth``; and ``reduce`` where tokens that stay take others in.
    Words and separators always go on.
    """

    stage: ClassVar[str] = "vision"
    verbs: ClassVar[tuple[str, ...]] = ("drop",)
    claims: ClassVar[tuple[Claim, ...]] = PICTURE_CLAIMS
    shortens: ClassVar[bool] = True
    adds: ClassVar[bool] = False  # whether the mean of those that join a token is added to it (see ``Request.adds``)

    def check(self) -> None:
        self.require(self.budget.shape == "uniform", "it says itself what each layer keeps: leave out 'pyramid:'.")

    def wants(self, depth: int) -> set[Want]:
        """What the attention of a vision encoder of ``depth`` blocks is asked for."""
        return set()

    def stays(self, n: int, given: tuple[int, ...]) -> dict[int, int]:
        """After which layers, counted from 0, how many of a picture's ``n`` tokens are left at most, of which each layer has
        ``given`` so many without this method. Nothing where that is an outcome: no other method can plan with it."""
        return {}

    def plan(self, request: Request, n: int, given: int) -> dict[int, int]:
        """``stays`` behind all methods that drop between layers and come before this one in the recipe; of the picture's ``n``
        tokens the first layer is ``given`` so many."""
        counts = (given,) * len(request.layers)
        for other in request.policy.leavers if request.policy is not None else ():
            if self is other or self is getattr(other, "inner", None):
                break
            if isinstance(other, InsideMethod):
                counts = thinned(counts, other.stays(n, counts))
        return self.stays(n, counts)

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Worth of every entry of the layer, float ``(batch, n)``; higher stays. Asked only in layers of ``stays``."""
        raise NotImplementedError

    def reduce(self, layer: KVLayer, picture: Entries, worth: torch.Tensor, k: int) -> Merge:
        """What becomes of a picture's entries, by their ``worth`` (c,): which ``k`` go on, fewer than there are, and which others
        they take in. Numbers are those among the picture's entries."""
        return Merge(only(best(worth, k), len(worth)))

    def leave(self, layer: KVLayer, call: Call) -> None:
        if self.budget.is_full or layer.index == layer.layers - 1:
            return
        stays = worth = None
        for picture in pictures_in(layer, onward=True):
            left = self.plan(layer.request, picture.size, picture.given)
            if layer.index not in left:
                continue
            if worth is None:
                worth, stays = self.worth(layer, call), everything(layer)
            if left[layer.index] < len(picture.slots):
                merge = self.reduce(layer, picture, worth[picture.row, picture.slots], left[layer.index])
                stays[picture.row, picture.slots] = False
                stays[picture.row, picture.slots[merge.kept]] = True
                take_in(layer, picture, merge, adds=self.adds)
        if stays is not None:
            self.go_on(layer, stays)

    def go_on(self, layer: KVLayer, stays: torch.Tensor) -> None:
        """Only the entries that ``stays`` (batch, n) names go on to deeper layers, as far as they are of this forward."""
        positions, new = layer.shared_positions[:, 0], layer.request.positions
        living = positions.masked_fill(~stays, -1).sort(dim=-1).values
        living = living.masked_fill(living < new.masked_fill(new < 0, new.max()).amin(-1, keepdim=True), -1)
        onward = layer.request.onward
        if onward is not None:  # what another method has dropped after the same layer stays dropped
            slots = locate(onward[:, None], living[:, None])[:, 0]
            living = onward.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -1)
        layer.request.onward = living[:, int((living < 0).sum(-1).min()) :]


@dataclass(frozen=True, kw_only=True)
class StagedMethod(InsideMethod):
    """Base of methods that keep the same share of a picture at the end of every stage of layers. The budget is the mean over the
    layers; the share follows from it, and from what methods before this one leave (see ``falling``)."""

    stages: int = parameter(4, "groups of layers that see the same tokens", least=2, search=(3, 6))

    def stays(self, n: int, given: tuple[int, ...]) -> dict[int, int]:
        return falling(self.budget, n, len(given), self.stages, given)


@dataclass(frozen=True)
class Entries:
    """The tokens of one picture that a layer holds.

    Attributes:
        number: of the picture in the forward (``Request.looked``); row: of the batch.
        slots: int64 ``(c,)`` ascending, of its entries in the layer.
        places: int64 ``(c,)``: which of the picture's competing tokens they are.
        size: how many it has; given: how many of them the first layer is given.
    """

    number: int
    row: int
    slots: torch.Tensor
    places: torch.Tensor
    size: int
    given: int


def pictures_in(layer: KVLayer, *, onward: bool = False) -> Iterator[Entries]:
    """The pictures of the running forward, as far as the layer holds any of their tokens; none where none come in.

    ``onward``: only tokens that no other method has dropped after this layer.
    """
    pictures = layer.request.pictures
    if pictures is None:
        return
    held, living = layer.shared_positions[:, 0], layer.request.onward if onward else None
    for number in range(len(layer.request.looked)):
        own = pictures == number
        row = int(own.any(-1).nonzero()[0])
        positions = own[row].nonzero()[:, 0]
        here = torch.isin(held[row], positions)
        if living is not None:
            here &= torch.isin(held[row], living[row])
        slots = here.nonzero()[:, 0]
        if len(slots):
            places = torch.searchsorted(positions, held[row, slots])
            yield Entries(number, row, slots, places, len(positions), layer.request.looked[number].given)


def everything(layer: KVLayer) -> torch.Tensor:
    """All entries of the layer: True, ``(batch, n)``."""
    return torch.ones_like(layer.shared_positions[:, 0], dtype=torch.bool)


def best(worth: torch.Tensor, k: int) -> torch.Tensor:
    """The numbers of the ``k`` largest of ``worth`` (c,), ascending."""
    return top(worth, k, torch.arange(len(worth), device=worth.device))


def only(kept: torch.Tensor, count: int) -> torch.Tensor:
    """What ``Merge`` is made of where of ``count`` entries those ``kept`` go on and nobody joins them, int64 ``(count,)``."""
    return torch.full((count,), -1, device=kept.device).index_copy(0, kept, kept)


def take_in(layer: KVLayer, picture: Entries, merge: Merge, *, adds: bool = False) -> None:
    """Lets entries of a picture that go on take in others of it (see ``Request.into`` and ``Request.adds``)."""
    request, at = layer.request, layer.shared_positions[picture.row, 0, picture.slots]
    joins = (merge.into >= 0) & (merge.into != torch.arange(len(at), device=at.device))
    if bool(joins.any()):
        request.into = torch.full_like(request.pictures, -1) if request.into is None else request.into
        into = request.into[picture.row]
        into[at[joins]] = at[merge.into[joins]]
        farther = into[into.clamp(min=0)]  # where another method let tokens join one that joins a third now
        request.into[picture.row] = torch.where((into >= 0) & (farther >= 0), farther, into)
        if adds:
            request.adds = torch.zeros_like(request.into, dtype=torch.bool) if request.adds is None else request.adds
            request.adds[picture.row, at[joins]] = True


def mean_keys(layer: KVLayer, picture: Entries) -> torch.Tensor:
    """The keys of a picture's entries, mean over heads, float32 ``(c, head_dim)``."""
    return dense(layer.keys)[picture.row][:, picture.slots].float().mean(0)


def attention_of_last(layer: KVLayer, call: Call) -> torch.Tensor:
    """Attention that every entry receives from the last token, ``(batch, n)``: mean over heads."""
    starts = layer.starts(call.window)  # by positions: after a drop a window holds fewer entries than tokens
    received = attention_received(
        call.query[:, :, -1:], layer.keys, scale=call.scale, softcap=call.softcap, starts=starts, window=call.window
    )
    return received.mean(1)


def attention_of(layer: KVLayer, call: Call, row: int, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``weights_of``, the mean over heads: ``(r, n)`` and ``(r, n)``. Only where all heads hold the same entries."""
    weights, seen = weights_of(layer, call, row, entries)
    return weights.mean((0, 1)), seen[0]


def weights_of(layer: KVLayer, call: Call, row: int, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What some ``entries`` (r,) of one row, tokens of this forward, attend to: probabilities ``(kv_heads, group, r, n)`` in
    float32, and which entries each of them sees, boolean ``(kv_heads or 1, r, n)``. For few of them: this is held as a whole."""
    at, own = layer.shared_positions[row, :, None], layer.shared_positions[row, 0, entries]
    new = entries - (layer.n - call.query.shape[2])
    last = own if call.reach is None else torch.maximum(call.reach[row, new], own)
    seen = (at >= 0) & (at <= last[:, None])
    if call.window is not None:
        seen &= at > own[:, None] - call.window
    query = call.query[row, :, new].float().unflatten(0, (layer.heads, -1))
    logits = torch.einsum("kgrd,knd->kgrn", query, dense(layer.keys)[row].float()) * call.scale
    return capped(logits, call.softcap).masked_fill(~seen[:, None], float("-inf")).softmax(-1), seen


def words_behind(layer: KVLayer, picture: Entries) -> torch.Tensor:
    """The entries of the words behind a picture, int64 ``(w,)``; the last entry where there are none."""
    rows = torch.arange(int(picture.slots[-1]) + 1, layer.n, device=picture.slots.device)
    kinds = layer.request.pictures[picture.row].to(rows.device)
    words = rows[kinds[layer.shared_positions[picture.row, 0, rows]] == WORD]
    return words if len(words) else torch.tensor([layer.n - 1], device=rows.device)


def by_words(
    layer: KVLayer,
    call: Call,
    reduce: Callable[[torch.Tensor], torch.Tensor],
    words: Callable[[KVLayer, Entries], torch.Tensor] = words_behind,
) -> torch.Tensor:
    """For every picture ``reduce`` of the attention ``(words, c)`` that ``words`` give to its c entries, all behind it or some of
    them: float ``(batch, n)``, 0 elsewhere. There are few words beside the many picture tokens."""
    worth = torch.zeros(layer.shared_positions[:, 0].shape, device=call.query.device)
    for picture in pictures_in(layer):
        given, _ = attention_of(layer, call, picture.row, words(layer, picture))
        worth[picture.row, picture.slots] = reduce(given[:, picture.slots])
    return worth
