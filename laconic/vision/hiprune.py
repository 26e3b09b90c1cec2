"""HiPrune: anchors on objects by a middle block, the rest by a deep one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Layout, Picture
from laconic.vision.select import candidates, top


@register
@dataclass(frozen=True, kw_only=True)
class HiPrune(VisionMethod):
    """Keeps a few anchors with their neighbours, by attention in a middle block, and fills up by attention in a deep block.

    Both are what a token receives from all patches, so that no class token is needed: middle blocks look at objects, deep ones
    gather in a few tokens what the picture is about. ``anchors`` of the budget, neighbours above, below, left and right counted
    in, goes to anchors; at small budgets that is none. In the released code the neighbours of a row's ends lie in the rows before
    and after, and without a class token anchors may be counted twice, so that fewer tokens stay: ``faithful_code`` does so too.
    """

    id: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "HiPrune: Hierarchical Attention for Efficient Token Pruning in Vision-Language Models (2025)"

    anchors: float = parameter(0.1, "share of the budget that goes to anchors and their neighbours", least=0, search=(0.0, 0.3))
    middle: float = parameter(0.375, "depth of the middle block, as a share of the encoder's", least=0, search=(0.5,))
    faithful_code: bool = parameter(False, "as released: neighbours wrap around, and anchors may be counted twice", search=())

    def check(self) -> None:
        super().check()
        self.require(self.anchors <= 1 and self.middle <= 1, "anchors and middle are shares: give at most 1.")

    def block(self, depth: int) -> int:
        """The middle block's number, from 0."""
        return min(max(round(self.middle * depth) - 1, 0), depth - 1)

    def wants(self, depth: int) -> set[Want]:
        return {Want("received", self.block(depth)), Want("received", -2)}

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        deep, among = picture.received(-2), candidates(picture)
        count = round(k * self.anchors / 5)
        kept = torch.zeros_like(among)
        if count:
            anchors = top(picture.received(self.block(picture.trace.depth)), count, picture.cells)
            kept[anchors] = True
            kept |= (wrapped if self.faithful_code else neighbours)(picture.layout, kept) & among
        if int(kept.sum()) > k:  # more neighbours than there is room for
            return top(deep, k, kept.nonzero()[:, 0])
        if self.faithful_code and not picture.trace.has_class:  # one is taken off the sums, which may be far larger
            fill = top(deep / cell_size(picture) - kept.float(), k - int(kept.sum()), picture.cells)
        else:
            fill = top(deep, k - int(kept.sum()), (among & ~kept).nonzero()[:, 0])
        kept[fill] = True
        return kept.nonzero()[:, 0]


def neighbours(layout: Layout, marked: torch.Tensor) -> torch.Tensor:
    """Boolean ``(n,)``: the tokens beside, above or below a marked one in its own crop."""
    found = torch.zeros_like(marked)
    for crop in layout.crop[marked].unique().tolist():
        height, width = layout.shapes[crop]
        here = (layout.crop == crop).nonzero()[:, 0]
        grid = torch.zeros(height + 2, width + 2, dtype=torch.bool)
        row, column = layout.row[here] + 1, layout.column[here] + 1
        grid[row, column] = marked[here].cpu()
        near = grid[row - 1, column] | grid[row + 1, column] | grid[row, column - 1] | grid[row, column + 1]
        found[here] = near.to(found.device)
    return found


def wrapped(layout: Layout, marked: torch.Tensor) -> torch.Tensor:
    """As ``neighbours``, of a grid that is one row of cells: the cell beside the end of a row is the next one's first."""
    found = torch.zeros_like(marked)
    for crop in layout.crop[marked].unique().tolist():
        height, width = layout.shapes[crop]
        here = (layout.crop == crop).nonzero()[:, 0]
        at = layout.row[here] * width + layout.column[here]
        near = at[marked[here].cpu()][:, None] + torch.tensor([-1, 1, -width, width])
        found[here] = torch.isin(at, near.clamp(0, height * width - 1)).to(found.device)
    return found


def cell_size(picture: Picture) -> int:
    """Patches that make one token."""
    patches = picture.recorded("received", -2).numel()
    return max(1, patches // sum(height * width for height, width in picture.layout.shapes))
