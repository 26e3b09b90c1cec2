"""Window merge: like neighbours become one patch at the beginning of the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.picture import Picture
from laconic.vision.thinning import INTO, Merging


@register
@dataclass(frozen=True, kw_only=True)
class WindowMerge(VisionMethod):
    """Merges square windows of like patches after the first block of the vision encoder, so that all later blocks get cheaper.

    A window is as alike as the mean cosine of its patches with each other, and becomes their mean, in the place of its middle
    one. The source merges windows above 0.8; here the most alike ones merge until the budget is met, of which the last may merge
    in part, so that a budget below what the threshold would leave mixes things with the ground around them. Below a ninth of the
    patches windows get larger. Of a picture that comes in several crops each crop keeps its share in the encoder; what cut-off
    padding then makes too few is filled up by members, and too many leave, small windows first. It is the first stage of
    MustDrop: ``window_merge:50% + mustdrop:20%``. There the merged patches stand in front of the others; here everything stays
    where it was.
    """

    id: ClassVar[str] = "window_merge"
    paper: ClassVar[str] = "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model (2024)"
    verbs: ClassVar[tuple[str, ...]] = ("drop", "merge")
    thins: ClassVar[type | None] = Merging

    window: int = parameter(3, "side of a window in tokens", least=2, search=(2,))

    def reduce(self, picture: Picture, k: int) -> Reduction:
        cells, layout = picture.cells, picture.layout
        taker = picture.of_patches(picture.recorded(INTO.kind, INTO.layer), "mean").round().long()  # of each token, in its crop
        index, widths = (t.to(taker.device) for t in (layout.index, torch.tensor([width for _, width in layout.shapes])))
        row, column, crop = (t[cells].to(taker.device) for t in (layout.row, layout.column, layout.crop))
        begins = index[cells] - row * widths[crop] - column
        token = torch.full((sum(h * w for h, w in layout.shapes),), -1, device=taker.device)  # -1: cut off with the padding
        token[index[cells]] = cells.to(taker.device)
        into = torch.full((len(layout),), -1, device=taker.device).index_copy(0, cells, token[begins + taker[cells]])
        sizes = torch.bincount(into[into >= 0], minlength=len(into))
        kept = cells[sizes[cells].argsort(descending=True, stable=True)[:k]].sort().values
        into[~torch.isin(into, kept)] = -1
        into[kept] = kept
        return Reduction(kept, None, into)
