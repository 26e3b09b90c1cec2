"""HISA: what a block has in common says whether its tokens are worth scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic import kernels
from laconic.attention.base import AttentionMethod, Call, ReadMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.blocks import best_blocks, group_vote, keep_top_among
from laconic.registry import register
from laconic.selection import Selection

REPRESENTATIVES = ("bounds", "mean")


@register
@dataclass(frozen=True, kw_only=True)
class HISA(ReadMethod):
    """Finds the tokens that a flat search would find, but scores only the best blocks' tokens.

    First every block of ``block`` tokens is scored by its representative, then each token of the best blocks: those that
    hold ``oversample`` tokens for each one that is read. Blocks of protected tokens, the first and the last are always
    among them. A score is the soft vote of the query heads of a KV head: softmax per head over the blocks, or over the
    candidate tokens, summed. The original scores keys that were trained for it, whose mean stands for a block. The keys of
    ordinary attention are not alike within a block, and its mean hides the one that matters: ``bounds``, the default here,
    takes the largest product that any key of the block can have.

    Models with an indexer of their own (DeepSeek sparse attention) get the same search by
    ``laconic.attention.indexer.hierarchical``.
    """

    id: ClassVar[str] = "hisa"
    paper: ClassVar[str] = "HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention (2026)"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("quest"), Claim("dense", "bytes_read", by=2))

    block: int = parameter(64, "tokens per block", least=1)
    oversample: float = parameter(4.0, "tokens of the chosen blocks per token that is read", least=1)
    representative: str = parameter("bounds", "what stands for a block: bounds (the largest product it can have) or mean")

    def check(self) -> None:
        known = ", ".join(REPRESENTATIVES)
        self.require(self.representative in REPRESENTATIVES, f"representative must be one of {known}.")

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        if self.covers(layer, call):
            return None
        quota, starts = self.quota(layer, call), layer.starts(call.window)
        blocks = layer.key_blocks(self.block, self.representative)
        needed = -(-int(quota.max()) // self.block) + 4  # up to four of those that must be among them may be cut
        count = max(needed, int(int(quota.max()) * self.oversample) // self.block)
        worth = group_vote(self._block_logits(call, blocks), layer.heads)
        slots = blocks.slots(best_blocks(worth, blocks, count, starts, sinks=self.sinks, recent=self.recent))
        slots = slots[..., int((slots < 0).sum(-1).min()) :]  # without those that are empty everywhere
        scores = self._token_votes(layer, call, slots, starts)
        read = blocks.bytes + int((slots >= 0).sum()) * layer.keys.shape[-1] * layer.keys.element_size()
        slots = keep_top_among(
            slots, scores, quota, layer.n, starts, sinks=self.sinks, recent=self.recent, name=self.id
        )
        return Selection(slots, bytes_scored=read)

    def _block_logits(self, call: Call, blocks: kernels.KeyBlocks) -> torch.Tensor:
        """``(batch, heads, blocks)``; -inf for a block that is empty."""
        if self.representative == "bounds":
            return _capped(kernels.block_bounds(call.last, blocks) * call.scale, call.softcap)
        logits = _capped(kernels.logits(call.last.float(), blocks.mean, scale=call.scale), call.softcap)
        empty = torch.arange(blocks.count, device=logits.device) >= blocks.counts[..., None]
        return logits.masked_fill(empty.repeat_interleave(logits.shape[1] // empty.shape[1], 1), float("-inf"))

    def _token_votes(
        self, layer: KVLayer, call: Call, slots: torch.Tensor, starts: torch.Tensor | None
    ) -> torch.Tensor:
        """Log votes ``(batch, kv_heads, c)`` for the candidates; protected tokens have no part in the softmax."""
        first = 0 if starts is None else starts[..., None]
        out = (slots < first + self.sinks) | (slots >= layer.n - self.recent)
        logits = kernels.logits(call.last, layer.keys, scale=call.scale, indices=slots.masked_fill(out, -1))
        return group_vote(_capped(logits, call.softcap), layer.heads)


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Capped logits, where the model caps them; -inf stays."""
    if softcap is None:
        return logits
    return (softcap * torch.tanh(logits / softcap)).masked_fill(logits == float("-inf"), float("-inf"))
