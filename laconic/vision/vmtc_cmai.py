"""VMTC, of VMTC and CMAI: primary tokens as they are, the background in clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.primitives.merge import Merge, kmeans
from laconic.registry import register
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.select import top


@register
@dataclass(frozen=True, kw_only=True)
class VMTC(VisionMethod):
    """Keeps the tokens that the encoder attends to, and merges all others into clusters of like ones.

    ``primary`` of the budget goes to the former. The others are clustered by the cosine of their projected features, and the
    first token of each cluster becomes the mean of its members. With fewer distinct tokens than clusters, the rest of the budget
    goes to primary tokens. The source's other half, which keeps words from attending to picture tokens that they have no reason
    to look at, goes with any method, and so is one of its own: ``vmtc_cmai:25% + cmai``. The source published no code, so that
    this is our reading.
    """

    id: ClassVar[str] = "vmtc_cmai"
    paper: ClassVar[str] = "Enhancing Instruction-Following Capability of VLMs by Reducing Image Redundancy (2024)"
    verbs: ClassVar[tuple[str, ...]] = ("drop", "merge")

    primary: float = parameter(0.8, "share of the budget that goes to primary tokens", least=0, search=(0.6, 0.9))
    seed: int = parameter(0, "of the clusters' first centres", search=())

    def check(self) -> None:
        super().check()
        self.require(self.primary <= 1, "primary is a share of the budget: give at most 1.")

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", -2)}

    def reduce(self, picture: Picture, k: int) -> Reduction:
        scores, cells = picture.salience(-2), picture.cells
        few = k - round(self.primary * k)
        rest = cells[~torch.isin(cells, top(scores, k - few, cells))]
        into = torch.full((len(picture.layout),), -1, device=picture.features.device)
        if few:
            member = kmeans(picture.features[rest], few, seed=self.seed)
            firsts = {int(c): int(rest[(member == c).nonzero()[0, 0]]) for c in member.unique()}
            into[rest] = torch.tensor([firsts[int(c)] for c in member], device=into.device)
            few = len(firsts)
        primary = top(scores, k - few, cells[into[cells] != cells])
        into[primary] = primary
        merge = Merge(into)
        return Reduction(merge.kept, merge.mean(picture.features), into, scores)
