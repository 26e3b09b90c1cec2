"""A method put together by name: any score, any selection, any budget of regions, any fate of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.primitives.merge import Merge, join_nearest
from laconic.registry import register
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.regions import REGIONS, share_out
from laconic.vision.scores import SCORES, wants_of
from laconic.vision.select import SELECTIONS


@register
@dataclass(frozen=True, kw_only=True)
class Design(VisionMethod):
    """Keeps what a score, a selection and a budget of regions say, each by its name, and drops or merges the rest.

    Most published methods that choose before the language model are one setting of these, so that they can be compared on equal
    terms, and cells that nobody has published can be tried: ``design(score=salience, select=covering, rest=merge):11%``. With
    ``rest=merge`` every token that is not kept joins the kept one that it is most like, and that becomes the mean of all.
    """

    id: ClassVar[str] = "design"
    paper: ClassVar[str] = "the common frame of the methods before the language model; the catalogue's entries name their papers"

    rests: ClassVar[tuple[str, ...]] = ("drop", "merge", "park")

    score: str = parameter("salience", f"what a token is worth: {', '.join(SCORES)}", search=tuple(SCORES))
    select: str = parameter("best", f"how a set is chosen by it: {', '.join(SELECTIONS)}", search=tuple(SELECTIONS))
    regions: str = parameter("whole", f"what gets a budget of its own: {', '.join(REGIONS)}", search=tuple(REGIONS))
    rest: str = parameter("drop", "what becomes of the others: drop, merge, or park until the next turn", search=("merge",))

    def check(self) -> None:
        super().check()
        for name, known in (("score", SCORES), ("select", SELECTIONS), ("regions", REGIONS)):
            self.require(getattr(self, name) in known, f"{name} is one of {', '.join(known)}.")

    def wants(self, depth: int) -> set[Want]:
        return wants_of(self.score)

    def reduce(self, picture: Picture, k: int) -> Reduction:
        worth = SCORES[self.score](picture)
        members, weights = REGIONS[self.regions](picture, worth, k)
        quotas = share_out(weights, k, torch.tensor([len(part) for part in members], device=weights.device))
        select: Callable = SELECTIONS[self.select]
        chosen = [select(picture, worth, int(n), part) for part, n in zip(members, quotas, strict=True) if n > 0]
        kept = torch.cat(chosen).sort().values
        if self.rest != "merge":
            return Reduction(kept, scores=worth)
        into = torch.full((len(picture.layout),), -1, device=kept.device)
        into[kept] = kept
        others = picture.cells[into[picture.cells] < 0]
        into[others] = join_nearest(picture.features, kept, others)
        return Reduction(kept, Merge(into).mean(picture.features), into, worth)
