"""GlobalCom2: the whole picture commands its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.regions import (
    crop_members,
    even_cells_of_parts,
    place_in_whole,
    share_out,
    top_of_regions,
    whole_cells_of_parts,
)  # fmt: skip
from laconic.vision.scores import novelty
from laconic.vision.select import top

LOGITS = 10.0  # the released temperature, for sums of logits


@register
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(VisionMethod):
    """Lets the whole picture say how much each of its parts keeps, and gives it a vote on every token of a part.

    A token is worth what the encoder attends to in its last block. The whole picture keeps its share of the budget; a part's
    share rises with the worth of its region in the whole by a softmax at ``temperature``, in units of their spread. In a part a
    token counts by its own worth and by that of its place in the whole, each of length 1 over the part. Worth here is attention,
    where the released code takes logits; the temperature is measured in spreads for that reason. ``faithful_code`` takes these
    logits (novelty without a class token) at a temperature of 10, divides the whole evenly among the parts although their padding
    is cut off, and rounds down, so that fewer tokens than the budget may stay.
    """

    id: ClassVar[str] = "globalcom2"
    paper: ClassVar[str] = "Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration (2025)"

    temperature: float = parameter(1.0, "of the softmax over parts, in spreads of their worth", least=1e-3, search=(0.3, 3.0))
    share: float = parameter(0.5, "weight of the whole picture's vote against the part's own", least=0, search=(0.25, 0.75))

    faithful_code: bool = parameter(False, "as released: logits, regions that forget padding, rounding down", search=())

    def check(self) -> None:
        super().check()
        self.require(self.share <= 1, "share lies between 0 and 1.")

    def wants(self, depth: int) -> set[Want]:
        return {Want(kind, -1) for kind in (("queries", "keys") if self.faithful_code else ("salience",))}

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        worth, members = self.worth(picture).cpu(), crop_members(picture.layout)
        if not any(picture.layout.parts):
            return top(worth, k, picture.cells)
        caps = torch.tensor([len(part) for part in members])
        ratio = k / int(caps.sum())
        grid = self.whole_grid(picture, worth)
        region = (even_cells_of_parts if self.faithful_code else whole_cells_of_parts)(picture.layout)
        sums = torch.zeros(len(members)).index_add_(0, region, grid.flatten())[1:]
        spread = LOGITS if self.faithful_code else sums.std(correction=0).clamp(min=1e-12)
        lift = ((sums - sums.max()) / (self.temperature * spread)).softmax(0)
        ratios = (ratio * (1 + lift - lift.mean())).clamp(max=1.0)
        weights = torch.cat([torch.tensor([ratio]), ratios]) * caps
        quotas = (weights + 1e-4).long() if self.faithful_code else share_out(weights, k, caps)
        return top_of_regions(self.votes(picture, worth, grid, members), members, quotas)

    def worth(self, picture: Picture) -> torch.Tensor:
        """Worth of every token, ``(n,)``."""
        if not self.faithful_code:
            return picture.salience(-1)
        if not picture.trace.has_class:
            return novelty(picture)
        query, keys = (picture.recorded(kind, -1).float() for kind in ("queries", "keys"))
        logits = (query[:, :, :1] @ keys[:, :, 1:].mT)[:, :, 0].mean(1) * query.shape[-1] ** -0.5
        return picture.of_patches(logits, "sum")

    def whole_grid(self, picture: Picture, worth: torch.Tensor) -> torch.Tensor:
        """Worth of the whole picture's cells, ``(height, width)``."""
        layout, here = picture.layout, picture.layout.crop == 0
        grid = torch.zeros(layout.shapes[0])
        grid[layout.row[here], layout.column[here]] = worth[here]
        return grid

    def votes(self, picture: Picture, worth: torch.Tensor, grid: torch.Tensor, members: list[torch.Tensor]) -> torch.Tensor:
        """Worth ``(n,)`` with the whole picture's vote in it, for tokens of the parts."""
        down, across = (share.nan_to_num(0.5) for share in place_in_whole(picture.layout))
        at = torch.stack([2 * across - 1, 2 * down - 1], dim=-1)[None, None]
        told = torch.nn.functional.grid_sample(grid[None, None], at, mode="bilinear", padding_mode="border", align_corners=False)
        told, votes = told[0, 0, 0], worth.clone()
        for part in members[1:]:
            own, given = (v[part] / v[part].norm().clamp(min=1e-12) for v in (worth, told))
            votes[part] = self.share * given + (1 - self.share) * own
        return votes
