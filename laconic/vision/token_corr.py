"""Token correlation: crops of which little repeats keep more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.regions import crop_members, share_out
from laconic.vision.select import top


@register
@dataclass(frozen=True, kw_only=True)
class TokenCorrelation(VisionMethod):
    """Gives every crop of a page a share by its density, and keeps what the encoder attends to in a shallow and in a deep block.

    A token repeats if more than ``many`` of its crop's tokens have keys whose cosine with its own is above ``alike``, as white
    paper does; the density is the share that does not. In the source it says how many stay; here the budget does, and the crops
    share it in proportion to their densities. Half of a crop's share comes from the shallow block (local detail), the rest from
    the deep one. No code was released and the numbers of the paper are not known: this is our reading.
    """

    id: ClassVar[str] = "token_corr"
    paper: ClassVar[str] = "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding (2024)"

    alike: float = parameter(0.9, "cosine of keys above which two tokens are alike", least=-1, search=(0.7, 0.8))
    many: float = parameter(1 / 16, "share of the crop's tokens that are alike before a token repeats", least=0, search=())
    shallow: float = parameter(0.25, "depth of the shallow block, as a share of the encoder's", least=0, search=())

    def block(self, depth: int) -> int:
        """The shallow block's number, from 0."""
        return min(int(self.shallow * depth), depth - 1)

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", self.block(depth)), Want("salience", -2), Want("keys", -2)}

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        members, keys = crop_members(picture.layout), picture.keys(-2)
        shallow, deep = picture.salience(self.block(picture.trace.depth)), picture.salience(-2)
        caps = torch.tensor([len(part) for part in members])
        weights = torch.tensor([density(keys[part], self.alike, self.many) * len(part) for part in members])
        kept = []
        for part, quota in zip(members, share_out(weights, k, caps).tolist(), strict=True):
            local = top(shallow, quota // 2, part)
            rest = part[~torch.isin(part, local)]
            kept += [local, top(deep, quota - len(local), rest)]
        return torch.cat(kept).sort().values


def density(keys: torch.Tensor, alike: float, many: float) -> float:
    """Share of a crop's tokens that do not repeat, by their ``keys`` (c, dim)."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    others = ((unit @ unit.t()).fill_diagonal_(-1.0) > alike).sum(-1)
    return float((others <= max(1.0, many * len(keys))).float().mean()) if len(keys) else 0.0
