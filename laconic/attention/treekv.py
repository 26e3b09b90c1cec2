"""TreeKV: neighbours compete in pairs, so that what is kept thins out smoothly towards the past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.scores import attention_received
from laconic.primitives.select import check_room
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class TreeKV(EvictMethod):
    """Drops, at each step, the worse of two neighbours; the pair moves on by one entry per step and starts over at the end.

    Between the first ``sinks`` tokens and the newest ones (``recent_share`` of the budget) lies the tree. A token's worth is the
    mean attention it received in the steps that it took part in. Every sweep of the pair halves what it passes, so what is
    kept gets sparser with age, and no two entries are compared that are far apart. A prompt is cut in the same
    manner by blocks of ``block`` tokens, whose worth is the attention of the prompt's last block. With ``structure=true``
    the older of the two always goes. Far behind, only what won every comparison is left: nothing is promised about a fact there.
    """

    id: ClassVar[str] = "treekv"
    paper: ClassVar[str] = "TreeKV: Smooth Key-Value Cache Compression with Tree Structures (2025)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("h2o"))

    recent: int = parameter(1, "newest tokens that are kept at least, whatever recent_share says", least=1)
    recent_share: float = parameter(0.5, "share of the budget that goes to the newest tokens", least=0)
    block: int = parameter(16, "tokens per block in which a prompt is cut; also the queries that judge it", least=1)
    structure: bool = parameter(False, "let the older of a pair go, whatever its attention")

    def check(self) -> None:
        self.require(self.recent_share <= 1, "recent_share must lie between 0 and 1.")

    def protected(self, quota: torch.Tensor) -> tuple[int, torch.Tensor]:
        recent = (quota.double() * self.recent_share).long().clamp(min=self.recent)
        return self.sinks, torch.minimum(recent, (quota - self.sinks).clamp(min=self.recent))

    def observe(self, layer: KVLayer, call: Call) -> None:
        rows = 1 if call.decoding else min(self.block, call.query.shape[2])
        received = attention_received(
            call.query[:, :, -rows:],
            layer.keys,
            scale=call.scale,
            softcap=call.softcap,
            starts=layer.starts(call.window) if call.decoding else layer.starts(),
            window=call.window,
        )
        took_part = (layer.n - torch.arange(layer.n, device=received.device)).clamp(max=rows).expand_as(received)
        for name, new in ((f"{self.id}.sum", received), (f"{self.id}.steps", took_part.float())):
            known = layer.tracks[name].n if name in layer.tracks else 0
            layer.track(name, torch.zeros_like(new[:, :, known:])).add_(new)

    def keep(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if self.covers(layer, call):
            return None
        quota, starts = self.quota(layer, call), layer.starts(call.window)
        sinks, recent = self.protected(quota)
        first = [0] * len(quota) if starts is None else starts.amin(-1).tolist()
        check_room(quota, layer.n - torch.tensor(first, device=quota.device), sinks, recent, self.id)
        worth = layer.tracks[f"{self.id}.sum"].view() / layer.tracks[f"{self.id}.steps"].view().clamp(min=1)
        at = layer.memory.setdefault(f"{self.id}.at", torch.zeros_like(quota))
        rows = []
        for row, (begin, size, newest) in enumerate(zip(first, quota.tolist(), recent.tolist(), strict=True)):
            kept = torch.arange(begin, layer.n, device=worth.device).expand(layer.heads, -1)
            if not call.decoding:
                kept = self._cut(kept, worth[row], size, newest)
            while kept.shape[1] > size:
                kept, at[row] = self._drop_one(kept, worth[row], newest, int(at[row]))
            rows.append(kept)
        longest = max(kept.shape[1] for kept in rows)
        return torch.stack([torch.nn.functional.pad(kept, (longest - kept.shape[1], 0), value=-1) for kept in rows])

    def _drop_one(self, kept: torch.Tensor, worth: torch.Tensor, recent: int, at: int) -> tuple[torch.Tensor, int]:
        """``kept`` slots (heads, v) without the worse entry of the pair at ``at`` in the tree, and where the next pair is."""
        region = kept.shape[1] - self.sinks - recent  # the tree, and the entry that has just left the recent ones
        if region < 2:
            return _without(kept, torch.full((kept.shape[0],), self.sinks, device=kept.device)), 0
        at = self.sinks + at % (region - 1)
        pair = worth.gather(1, kept[:, at : at + 2])
        right = (pair[:, 0] > pair[:, 1]) & (not self.structure)
        return _without(kept, at + right.long()), (at - self.sinks + 1) % (region - 1)

    def _cut(self, kept: torch.Tensor, worth: torch.Tensor, size: int, recent: int) -> torch.Tensor:
        """A prompt's slots (heads, v) after the same tournament over its blocks; at most ``size`` and the odd tokens stay."""
        room = (size - self.sinks - recent) // self.block
        middle = kept[:, self.sinks : kept.shape[1] - recent]
        count = middle.shape[1] // self.block
        if count <= room or kept.shape[1] <= size:
            return kept
        odd = middle.shape[1] - count * self.block  # the oldest tokens, which fill no block
        blocks = middle[:, odd:].unflatten(1, (count, self.block))
        value = worth.gather(1, blocks.flatten(1)).unflatten(1, (count, self.block)).mean(-1)
        chosen = _tournament(value, room, self.structure)
        picked = blocks.gather(1, chosen[..., None].expand(-1, -1, self.block)).flatten(1)
        return torch.cat([kept[:, : self.sinks], picked, kept[:, kept.shape[1] - recent :]], dim=1)


def _without(kept: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """``kept`` (heads, v) without the entry at ``place`` (heads,)."""
    index = torch.arange(kept.shape[1] - 1, device=kept.device).expand(kept.shape[0], -1)
    return kept.gather(1, index + (index >= place[:, None]))


def _tournament(value: torch.Tensor, room: int, structure: bool) -> torch.Tensor:
    """Which of the blocks with ``value`` (heads, count), arriving one after the other, ``room`` places hold in the end."""
    heads, count = value.shape
    held = torch.arange(min(room, count), device=value.device).expand(heads, -1)
    at = 0
    for block in range(room, count):
        held = torch.cat([held, torch.full((heads, 1), block, device=value.device)], dim=1)
        if room == 0:
            held = held[:, 1:]
            continue
        pair = value.gather(1, held[:, at : at + 2])
        right = (pair[:, 0] > pair[:, 1]) & (not structure)
        held, at = _without(held, at + right.long()), (at + 1) % room
    return held
