"""CMAI: words do not look at picture tokens that neither they nor the words they read look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic import kernels
from laconic.attention.base import AttentionMethod, Call
from laconic.attention.prefill import prefill_attention
from laconic.cache import WORD, KVLayer, Lasting, Request
from laconic.claims import Claim
from laconic.kernels.ragged import dense
from laconic.method import parameter
from laconic.primitives.scores import attention_received
from laconic.registry import register
from laconic.vision.encoder import Want
from laconic.vision.inside import weights_of
from laconic.vision.watch import rows_at

ROWS = 64  # words whose attention is held at a time
KINDS = "cmai.kinds"  # of the request, int64 (batch, positions): as ``Request.pictures``, of all forwards so far
COLUMNS = "cmai.columns"  # of a layer, int64 (batch, i): positions of the picture tokens it was given, -1 for none
INTEREST = "cmai.interest"  # of a layer, float32 (batch, words, i): attention of each word so far to each of these; 0 if unknown


@register
@dataclass(frozen=True, kw_only=True)
class CMAI(AttentionMethod):
    """Keeps every word from attending to the picture tokens that it has the least reason to look at; nothing is dropped.

    A word's focus on a picture token is what the words that it reads, itself among them, attend to it: F = A_tt A_ti with A the
    layer's own attention, mean over heads, and the rows of A_tt scaled to sum 1. The share ``inhibit`` of the picture tokens that
    a word sees, those of lowest focus, get no attention from it, and its softmax is taken over the rest; at least one picture
    token stays. It holds for the words of the prompt and for each that is written, from the share ``since`` of the layers on.
    Words are what is neither picture nor separator, special tokens among them. This saves nothing: the words of a prompt cost
    their attention once more, a step reads the keys twice, and each of these layers remembers 4 bytes for every word and picture
    token, which a step copies. The source publishes no code, and trains with it: this is our reading, of a model
    that was not trained with it. Its other half is ``vmtc_cmai``.
    """

    id: ClassVar[str] = "cmai"
    paper: ClassVar[str] = "Enhancing Instruction-Following Capability of VLMs by Reducing Image Redundancy (2024)"
    stage: ClassVar[str] = "vision"
    verbs: ClassVar[tuple[str, ...]] = ("reweight",)
    takes_budget: ClassVar[bool] = False
    claims: ClassVar[tuple[Claim, ...]] = ()

    inhibit: float = parameter(0.5, "share of the picture tokens that a word does not attend to", least=0, search=(0.25, 0.75))
    since: float = parameter(0.5, "share of the layers that come before the first that inhibits", least=0, search=())

    def check(self) -> None:
        self.require(self.budget.is_full, "it keeps everything, so it takes no budget.")
        self.require(self.inhibit <= 1 and self.since < 1, "inhibit is a share of at most 1, since one below 1.")

    def wants(self, depth: int) -> set[Want]:
        """What the attention of a vision encoder of ``depth`` blocks is asked for."""
        return set()

    @property
    def attends(self) -> bool:
        return self.inhibit > 0

    def attend(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, int] | None:
        if layer.index < self.since * layer.layers or not find_pictures(layer):
            return None
        read = layer.keys.numel() + layer.values.numel() + (layer.keys.numel() if call.decoding else 0)
        output = self._step(layer, call) if call.decoding else self._prompt(layer, call)
        return output, read * layer.keys.element_size()

    def _prompt(self, layer: KVLayer, call: Call) -> torch.Tensor:
        keys, values, kinds = dense(layer.keys), dense(layer.values), layer.request.memory[KINDS].tensor
        output = prefill_attention(
            call.query, keys, values, layer.shared_positions, scale=call.scale, window=call.window, softcap=call.softcap,
            reach=call.reach,
        ).clone()  # fmt: skip  (rows are written into it, and its gradient may be worked out from what it was)
        for row, own in enumerate(rows_at(layer.request).to(kinds.device)):
            words = ((own >= 0) & (kinds[row, own.clamp(min=0)] == WORD)).nonzero()[:, 0]
            parts = words.split(ROWS)
            for part in parts if call.reach is not None else ():  # words that see later ones: what these look at comes first
                self._inhibited(layer, row, own[part], *self._weights(layer, call, row, part))
            for part in parts:
                weights, seen = self._weights(layer, call, row, part)
                gone = self._inhibited(layer, row, own[part], weights, seen)
                left = weights.masked_fill(gone[:, None], 0.0)
                left /= left.sum(-1, keepdim=True)
                output[row, :, part] = torch.einsum("kgrn,knd->kgrd", left, values[row].float()).flatten(0, 1).to(output.dtype)
        return output

    def _weights(self, layer: KVLayer, call: Call, row: int, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weights_of(layer, call, row, part + layer.n - call.query.shape[2])

    def _step(self, layer: KVLayer, call: Call) -> torch.Tensor:
        starts = layer.starts(call.window)
        options = {"scale": call.scale, "softcap": call.softcap}
        weights = attention_received(call.query, layer.keys, starts=starts, window=call.window, **options)
        slots = torch.arange(layer.n, device=weights.device)
        seen = torch.ones_like(weights, dtype=torch.bool) if starts is None else slots >= starts[..., None]
        own, hidden = rows_at(layer.request).to(weights.device), ~seen
        for row in range(len(weights)):
            part = weights[row, :, None, None], seen[row, :, None]
            hidden[row] |= self._inhibited(layer, row, own[row], *part)[:, 0]
        output, _ = kernels.selected_attention(
            call.last, layer.keys, layer.values, slots.expand_as(hidden).masked_fill(hidden, -1), **options
        )
        return output[:, :, None]

    @torch.no_grad()  # a choice has no gradient, and what is remembered of one forward must not hold on to its graph
    def _inhibited(self, layer: KVLayer, row: int, own: torch.Tensor, weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Entries that words at positions ``own`` (r,) of a row do not attend to, boolean ``(kv_heads, r, n)``; remembers what
        the words look at.

        Args:
            weights: their attention, ``(kv_heads, group, r, n)``. seen: boolean ``(kv_heads or 1, r, n)``.
        """
        kinds, store = layer.request.memory[KINDS].tensor[row], layer.memory[INTEREST].tensor[row]
        nowhere = len(kinds)  # a position that stands for none
        at = layer.positions[row].masked_fill(layer.positions[row] < 0, nowhere)
        attention, sees = (by_position(x, at, nowhere) for x in (weights.mean(1), seen.expand(len(at), -1, -1).float()))
        columns = layer.memory[COLUMNS].tensor[row]
        columns = columns.masked_fill(columns < 0, nowhere)
        words = (kinds == WORD).nonzero()[:, 0]
        store[torch.searchsorted(words, own)] = attention[:, columns]
        read = attention[:, words]
        focus = read / read.sum(-1, keepdim=True) @ store[: len(words)]
        lowest = focus.masked_fill(sees[:, columns] == 0, float("inf")).argsort(dim=-1, stable=True)
        visible = (sees[:, columns] > 0).sum(-1, keepdim=True)
        count = torch.minimum((visible * self.inhibit + 1e-6).long(), visible - 1)
        chosen = torch.arange(len(columns), device=count.device) < count
        hidden = torch.zeros(len(own), nowhere + 1, dtype=torch.bool, device=count.device)
        hidden.scatter_(1, columns[lowest], chosen)
        hidden[:, nowhere] = False
        return hidden[:, at].movedim(1, 0)


def by_position(values: torch.Tensor, at: torch.Tensor, nowhere: int) -> torch.Tensor:
    """Mean over heads of ``values`` (heads, r, n) of entries that stand ``at`` (heads, n), by position: ``(r, nowhere + 1)``,
    0 at ``nowhere``. What a head does not hold counts as 0 there."""
    table = values.new_zeros(values.shape[1], nowhere + 1)
    table.index_add_(1, at.flatten(), values.movedim(0, 1).flatten(1))
    table[:, nowhere] = 0.0
    return table / len(values)


def find_pictures(layer: KVLayer) -> bool:
    """Takes down what the running forward brings of pictures and words; whether the layer has been given any picture token."""
    request, memory = layer.request, layer.memory
    columns = memory[COLUMNS].tensor if COLUMNS in memory else None
    if columns is not None:
        columns = columns.masked_fill(columns >= first_of(request).to(columns.device), -1)
    if request.pictures is not None:
        fresh = shown_positions(request)
        columns = fresh if columns is None else torch.cat([columns, fresh], dim=1)
    if columns is None or not columns.shape[1]:
        return False
    memory[COLUMNS] = Lasting(columns)
    words = int((kinds_so_far(request) == WORD).sum(-1).max())
    interest = torch.zeros(len(columns), words, columns.shape[1], device=columns.device)
    if INTEREST in memory:
        known = memory[INTEREST].tensor[:, :words]
        interest[:, : known.shape[1], : known.shape[2]] = known
    memory[INTEREST] = Lasting(interest)  # this forward writes into it: whoever holds the one before keeps what it was
    return True


def first_of(request: Request) -> torch.Tensor:
    """Position of each row's first token of the running forward, int64 ``(batch, 1)``: what is known of it and of later ones is
    of a text that was cropped."""
    at = request.positions
    return at.masked_fill(at < 0, torch.iinfo(at.dtype).max).amin(-1, keepdim=True)


def shown_positions(request: Request) -> torch.Tensor:
    """Positions of the picture tokens among the rows that the running layer computes, int64 ``(batch, i)``, -1 in front."""
    at = rows_at(request).to(request.pictures.device)
    shown = (at >= 0) & (request.pictures.gather(1, at.clamp(min=0)) >= 0)
    at = at.masked_fill(~shown, -1).sort(dim=-1).values
    return at[:, at.shape[1] - int(shown.sum(-1).max()) :]


def kinds_so_far(request: Request) -> torch.Tensor:
    """What stands at every position so far, ``(batch, positions)``, as in ``Request.pictures``; this forward's are added."""
    count = int(request.positions.max()) + 1
    known = request.memory[KINDS].tensor if KINDS in request.memory else request.pictures
    kinds = torch.nn.functional.pad(known, (0, max(0, count - known.shape[1])), value=WORD)
    cut = torch.arange(kinds.shape[1], device=kinds.device) >= first_of(request).to(kinds.device)
    kinds = kinds.masked_fill(cut, WORD)
    if request.pictures is not None:
        new = request.pictures
        kinds[:, : new.shape[1]] = torch.where(new == WORD, kinds[:, : new.shape[1]], new)
    request.memory[KINDS] = Lasting(kinds)
    return kinds
