"""Coarse to fine: blocks, 8-bit keys, frequency pairs and exact keys, each scoring only what the cheaper ones left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from laconic.attention.base import AttentionMethod, Call, ReadMethod
from laconic.attention.fasa import copies, dominant_pairs
from laconic.attention.search import Blocks, Tokens, exact_keys, int8_keys
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.kernels.blocks import KINDS
from laconic.method import parameter
from laconic.profiles import need_file
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class CoarseToFine(ReadMethod):
    """Finds the tokens to read by a chain of scores of your choice, from coarse to fine.

    The stages that are switched on run in this order: bounds or means of ``block`` tokens, 8-bit keys, the dominant ``pairs``
    of dimensions of the rotary embedding, exact keys. Each scores only what the one before it left, and leaves its
    ``oversample`` times the budget; the last one leaves the budget. A score is the soft vote of the query heads of a KV head.
    ``quest`` is the first stage alone, ``hisa`` the first and the last, ``tokenselect(per_head=true, int8=true)`` the second
    alone (at the scale of the attention), ``fasa`` the third. The default, blocks and then the 8-bit keys of their tokens,
    reads less than any of these. Memory grows by what the stages keep beside the cache: 2 / ``block`` of the keys for bounds,
    a byte per dimension for 8-bit keys (which cannot follow blocks smaller than a tile of 16 tokens without reading others'),
    the dominant dimensions of every key for pairs.
    """

    id: ClassVar[str] = "coarse_to_fine"
    paper: ClassVar[str] = "this project"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("quest"), Claim("hisa"), Claim("hisa", "bytes_read"))

    block: int = parameter(32, "tokens per block; 0 switches blocks off", least=0, search=(16, 32, 64))
    representative: str = parameter("bounds", "what stands for a block: bounds (the largest product it can have) or mean")
    block_oversample: float = parameter(4.0, "tokens of the chosen blocks per token that is read", least=1)
    int8: bool = parameter(True, "score 8-bit keys, which stand beside the cache: a quarter of the bytes of float32")
    int8_oversample: float = parameter(2.0, "tokens that they leave per token that is read, unless they come last", least=1)
    pairs: int = parameter(0, "dominant pairs of dimensions that are scored; needs a profile of fasa", least=0, search=())
    pairs_oversample: float = parameter(2.0, "tokens that they leave per token that is read, unless they come last", least=1)
    exact: bool = parameter(False, "score the exact keys at last")
    profile: str = parameter("", "a file of laconic profile fasa; empty: the one that comes with a built-in model")

    def check(self) -> None:
        self.require(self.representative in KINDS, f"representative must be one of {', '.join(KINDS)}.")
        self.require(bool(self.chain), "all stages are off: switch on one of block, int8, pairs and exact.")
        need_file(self.id, self.profile)

    @property
    def chain(self) -> list[Blocks | Tokens]:
        pairs = partial(dominant_pairs, pairs=self.pairs, profile=self.profile)
        stages = (
            (self.block, Blocks(self.block, self.representative, oversample=self.block_oversample)),
            (self.int8, Tokens(int8_keys, self.int8_oversample)),
            (self.pairs, Tokens(pairs, self.pairs_oversample)),
            (self.exact, Tokens(exact_keys)),
        )
        return [stage for on, stage in stages if on]

    def observe(self, layer: KVLayer, call: Call) -> None:
        if self.pairs:
            copies(layer, self.pairs, self.profile)
