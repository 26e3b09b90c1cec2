"""HISA: what a block has in common says whether its tokens are worth scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from laconic.attention.base import AttentionMethod, ReadMethod
from laconic.attention.search import Blocks, Tokens, exact_keys
from laconic.claims import Claim
from laconic.kernels.blocks import KINDS
from laconic.method import parameter
from laconic.registry import register


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
        self.require(self.representative in KINDS, f"representative must be one of {', '.join(KINDS)}.")

    @property
    def chain(self) -> list[Blocks | Tokens]:
        return [Blocks(self.block, self.representative, oversample=self.oversample), Tokens(exact_keys)]
