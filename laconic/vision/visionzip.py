"""VisionZip: the tokens that the encoder looks at, and a few that stand for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.primitives.merge import Merge, join_nearest
from laconic.registry import register
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.select import spread, top


@register
@dataclass(frozen=True, kw_only=True)
class VisionZip(VisionMethod):
    """Keeps the most salient tokens as they are, and merges the others into a few at even distances.

    Salient is what the class token attends to in the block before the last, or what all patches attend to where there is none.
    ``contextual`` of the budget goes to targets spread evenly over the other tokens in the order of the prompt; every token that
    is left joins the target with the most similar key, and the target becomes the mean of itself and the mean of those that
    joined. The released code adds that mean to it, which doubles its length: ``faithful_code`` does so too.
    """

    id: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip: Longer is Better but Not Necessary in Vision Language Models (2024)"
    verbs: ClassVar[tuple[str, ...]] = ("drop", "merge")

    contextual: float = parameter(0.16, "share of the budget that goes to merged tokens", least=0, search=(0.0, 0.32))
    faithful_code: bool = parameter(False, "as released: a target and the mean of what joins it are added", search=())

    def check(self) -> None:
        super().check()
        self.require(self.contextual < 1, "contextual is a share of the budget: give less than 1.")

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", -2), Want("keys", -2)}

    def reduce(self, picture: Picture, k: int) -> Reduction:
        scores = picture.salience(-2)
        few = min(int(self.contextual * k), k - 1)
        into = torch.full((len(picture.layout),), -1, device=picture.features.device)
        salient = top(scores, k - few, picture.cells)
        into[salient] = salient
        rest = picture.cells[into[picture.cells] < 0]
        if few:
            targets = spread(rest, few)
            into[targets] = targets
            movers = rest[into[rest] < 0]
            into[movers] = join_nearest(picture.keys(-2), targets, movers)
        merge = Merge(into)
        own, (joined, count) = picture.features.float()[merge.kept], merge.of_others(picture.features)
        both = own + joined
        return Reduction(merge.kept, both if self.faithful_code else torch.where(count > 0, both / 2, own), into, scores)
