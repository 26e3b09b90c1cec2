"""Base of the methods that shorten a picture between the encoder and the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.base import POSITIONS
from laconic.claims import Claim
from laconic.method import Method, parameter
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.select import top


def better_than(rival: str) -> Claim:
    """The claim to answer more questions about scenes right than a rival, at 64 of 576 tokens."""
    return Claim(rival, budget="11.1%", task="shapes_vqa", lengths=(), samples=120)


PICTURE_CLAIMS = (better_than("random_prune"), better_than("uniform"))  # what any choice of picture tokens must hold


@dataclass(frozen=True)
class Reduction:
    """What stays of one picture.

    Attributes:
        kept: int64 ``(k,)`` ascending: tokens of the picture, separators not among them.
        features: ``(k, dim)`` where kept tokens took others in; None: as they were.
        into: int64 ``(n,)``: for each token the kept one that took it in, itself where it stays, -1 where it is dropped.
        scores: float ``(n,)``: what the choice was made by, for pictures of it; None where there is no such thing.
    """

    kept: torch.Tensor
    features: torch.Tensor | None = None
    into: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class VisionMethod(Method):
    """Shortens every picture of a prompt before the language model's first layer: nothing of what is dropped is computed or held.

    The budget counts the tokens of one picture, all of its crops together; separators (marks at the ends of rows) stay besides.
    A subclass writes ``score``, or ``choose`` where a choice is more than the best scores, or ``reduce`` where tokens take others
    in.
    """

    stage: ClassVar[str] = "vision"
    verbs: ClassVar[tuple[str, ...]] = ("drop",)
    claims: ClassVar[tuple[Claim, ...]] = PICTURE_CLAIMS
    thins: ClassVar[type | None] = None  # what lets patches leave inside the encoder (see ``laconic.vision.thinning``)
    reads_first_layer: ClassVar[bool] = False  # looks at ``Picture.from_words``
    rests: ClassVar[tuple[str, ...]] = ("drop", "park")

    positions: str = parameter("keep", "keep: kept tokens stand where they stood; compact: renumbered without gaps", search=())

    rest: str = parameter("drop", "drop: what is not kept is gone; park: a later turn of a conversation chooses again", search=())

    def check(self) -> None:
        self.require(self.rest in self.rests, f"rest is one of {', '.join(self.rests)}.")
        compact = self.positions == "compact"
        self.require(not (compact and self.rest == "park"), "what is parked keeps its place: leave out positions=compact.")
        self.require(self.budget.shape == "uniform", "a picture is shortened once, before all layers: leave out 'pyramid:'.")
        self.require(self.positions in POSITIONS, f"positions must be one of {', '.join(POSITIONS)}.")

    def wants(self, depth: int) -> set[Want]:
        """What the attention of a vision encoder of ``depth`` blocks is asked for."""
        return set()

    def reduce(self, picture: Picture, k: int) -> Reduction:
        """What stays of a picture, ``k`` of its competing tokens, fewer than there are."""
        kept = self.choose(picture, k)
        return Reduction(kept)

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        """The ``k`` tokens that stay, int64 ascending, none of them a separator."""
        return top(self.score(picture), k, picture.cells)

    def score(self, picture: Picture) -> torch.Tensor:
        """Worth of every token, float ``(n,)``; higher stays."""
        raise NotImplementedError
