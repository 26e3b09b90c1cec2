"""Quest: the bounds of a page say which pages a query can need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from laconic.attention.base import AttentionMethod, Call, ReadMethod
from laconic.attention.search import Blocks, Tokens
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.reduce import GROUP
from laconic.registry import register
from laconic.selection import Selection


@register
@dataclass(frozen=True, kw_only=True)
class Quest(ReadMethod):
    """Reads the pages whose keys can have the largest product with the query.

    Each page of ``page`` neighbouring tokens keeps the elementwise largest and smallest of its keys, which bound q.k for
    all of them: the sum over the dimensions of the larger of q * max and q * min. Bounds are reduced over the query heads
    of a KV head, and pages are read from the highest bound down until the budget is used; the last one in part. Scoring
    reads 2 / ``page`` of the keys' bytes. Nothing is forgotten, so memory grows by the bounds.
    """

    id: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (
        *AttentionMethod.claims, Claim("dense", "bytes_read", by=4), Claim("snapkv", question="after"),
    )  # fmt: skip

    page: int = parameter(16, "tokens per page", least=1)
    reduce: str = parameter("max", "from query heads to their KV head: max, mean or sum of the bounds")
    dense_layers: int = parameter(0, "first layers that read everything; the original leaves 2 alone", least=0)

    def check(self) -> None:
        self.require(self.reduce in GROUP, f"reduce must be one of {', '.join(GROUP)}.")

    @property
    def chain(self) -> list[Blocks | Tokens]:
        return [Blocks(self.page, reduce=self.reduce)]

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        if layer.index < self.dense_layers:
            return None
        return super().select(layer, call)
