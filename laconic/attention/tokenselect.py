"""TokenSelect: the heads vote for the tokens that this step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import POSITIONS, AttentionMethod, Call, ReadMethod
from laconic.attention.search import Blocks, Keys, Tokens, exact_keys, flat_vote, int8_keys
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.reduce import pool
from laconic.primitives.select import hide, keep_top
from laconic.registry import register
from laconic.selection import Selection


@register
@dataclass(frozen=True, kw_only=True)
class TokenSelect(ReadMethod):
    """Reads the tokens that the query heads jointly vote for: softmax per head over the candidates, summed over heads.

    Candidates are all tokens between the protected first and newest ones. The choice is reused while the query points the
    same way: as long as the cosine with the query of the last selection is at least ``refresh``, only the newest tokens are
    added anew. With ``positions=compact`` the chosen tokens are renumbered without gaps, which lets a model read texts
    beyond its trained length; keys before RoPE are then kept as well. The budget counts protected and voted tokens
    together. Nothing is forgotten, so memory does not shrink.
    """

    id: ClassVar[str] = "tokenselect"
    paper: ClassVar[str] = "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("quest"), Claim("snapkv", question="after"))

    refresh: float = parameter(0.9, "reuse the selection while the query's cosine is at least this; above 1: never reuse")
    kernel: int = parameter(1, "width of the max pooling of votes over positions, odd; 1 switches it off", least=1)
    per_head: bool = parameter(False, "let every KV head read its own set instead of one set per layer")
    scale: float = parameter(1.0, "what q.k is multiplied by in the vote; 0 takes the scale of the model's attention")
    positions: str = parameter("keep", "keep: where the tokens stand; compact: renumbered without gaps")
    int8: bool = parameter(False, "vote on 8-bit keys, which stand beside the cache: a quarter of the bytes to read")

    def check(self) -> None:
        self.require(self.positions in POSITIONS, f"positions must be one of {', '.join(POSITIONS)}.")
        self.require(self.kernel % 2 == 1, f"kernel={self.kernel} is even, which would shift positions: use an odd one.")
        self.require(not (self.int8 and self.positions == "compact"), "int8 and positions=compact exclude each other.")

    @property
    def reads_chunks(self) -> bool:  # type: ignore[override]
        """With compact positions the prompt too is read through the selection, chunk by chunk."""
        return self.positions == "compact"

    @property
    def chain(self) -> list[Blocks | Tokens]:
        """A vote of each KV head for itself, anew in every step, at the scale of the attention."""
        return [Tokens(int8_keys if self.int8 else exact_keys)]

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        if self.covers(layer, call):
            return None
        if self.positions == "compact":
            self.need_rope(layer)
        query = self._fingerprint(layer, call)
        slots, scored = self._remembered(layer, call, query)
        if slots is None:
            slots, scored = self._vote(layer, call, query)
        if self.positions == "keep":
            return Selection(slots, bytes_scored=scored)
        rank = (slots >= 0).cumsum(-1) - 1
        return Selection(slots, scored, key_positions=rank, query_shift=rank[:, 0, -1] + 1 - layer.lengths)

    def observe(self, layer: KVLayer, call: Call) -> None:
        if not call.decoding:  # what a new piece of prompt brought was no candidate of the last selection
            layer.slots.pop(self.id, None)

    def _fingerprint(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """The query free of its own position, mean over the new tokens: ``(batch, heads, head_dim)``."""
        query = call.query
        if layer.rope is not None:
            own = layer.shared_positions[:, :1, -query.shape[2] :].clamp(min=0)
            query = layer.rope.rotate(query, -own)
        return query.mean(2)

    def _vote(self, layer: KVLayer, call: Call, fingerprint: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Fresh slots and the bytes read to find them; remembers both query and slots."""
        new = call.query.shape[2]
        recent = max(self.recent, new)  # a chunk's own tokens are no candidates: some of them lie in the future
        starts = layer.starts(call.window)
        keys, query = layer.keys, call.query.mean(2)
        if self.positions == "compact":  # every key at the same distance from the query
            distance = torch.full((1, 1), recent, device=query.device)
            keys, query = layer.raw_keys, layer.rope.rotate(fingerprint, distance)
        source = Keys(query, keys, layer.key_index() if self.int8 else None, None if self.scale else call.softcap)
        over = "group" if self.per_head else "layer"
        votes = flat_vote(source, layer, call, sinks=self.sinks, recent=recent, scale=self.scale or None, over=over)
        quota = self.quota(layer, call)
        if not call.decoding:
            quota = torch.minimum(quota + new, layer.lengths)
        slots = keep_top(pool(votes, self.kernel, "max"), quota, starts, self.sinks, recent, self.id)
        layer.memory[self.id], layer.slots[self.id] = fingerprint, slots
        layer.memory[self.id + ".chose"] = ~self.covered(layer, call)
        return slots, source.bytes()

    def _remembered(self, layer: KVLayer, call: Call, query: torch.Tensor) -> tuple[torch.Tensor | None, int]:
        """The last selection with the newest tokens added, and the bytes read; None when it holds for no row any more.

        Rows of a batch decide for themselves, so that each equals its run alone; one whose budget still holds everything
        reads everything, and has not chosen yet.
        """
        last, slots = layer.memory.get(self.id), layer.slots.get(self.id)
        if slots is None or not call.decoding or self.refresh > 1:
            return None, 0
        starts, count = layer.starts(call.window), slots.shape[-1]
        covered, chose = self.covered(layer, call), layer.memory[self.id + ".chose"]
        near = torch.nn.functional.cosine_similarity(query.flatten(1), last.flatten(1), dim=-1) >= self.refresh
        near, scored = near & chose & ~covered, 0
        if not bool((near | covered).any()):
            return None, 0
        newest = torch.arange(layer.n - count, layer.n, device=slots.device).expand_as(slots)
        reused = torch.cat([slots[..., : count - self.recent], newest[..., count - self.recent :]], dim=-1)
        if not bool((near | covered).all()):
            fresh, scored = self._vote(layer, call, query)
            reused = torch.where(near[:, None, None], reused, fresh)
            layer.memory[self.id] = torch.where(near[:, None, None], last, query)
            layer.slots[self.id] = reused
        return hide(torch.where(covered[:, None, None], newest, reused), starts), scored
