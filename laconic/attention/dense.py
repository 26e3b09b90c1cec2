"""Dense attention: the reference that every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from laconic.attention.base import AttentionMethod
from laconic.claims import Claim
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Dense(AttentionMethod):
    """Keeps and reads everything, with our cache and kernels.

    The tokens are those of the stock model; the speed is not: the cache is preallocated and the decode kernel reads each
    key once for all query heads of its group.
    """

    id: ClassVar[str] = "dense"
    paper: ClassVar[str] = "Attention Is All You Need (2017)"
    claims: ClassVar[tuple[Claim, ...]] = ()
    guarantee: ClassVar[str] = "exact"
    takes_budget: ClassVar[bool] = False

    def check(self) -> None:
        self.require(self.budget.is_full, "it keeps everything, so it takes no budget: write 'dense'.")
