"""Recoverable compression: what the encoder sees, what the question asks for, and a few tokens for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.primitives.allocate import largest_remainder
from laconic.registry import register
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.select import top

OUTLIER = 1.5  # local outlier factors above this are outliers


@register
@dataclass(frozen=True, kw_only=True)
class RecoverableCompression(VisionMethod):
    """Keeps salient tokens, recovers from the others what is like the question, and condenses the rest into a few tokens.

    How many of each is told by outliers: the local outlier factor flags attention values, and then likenesses, that stand out
    from their neighbours in value; their numbers, and that of centres among the rest, share the budget. Every centre takes in the
    ``near`` rest tokens that are most like it in keys and question, each times its attention; one more token is the sum of what
    is left. The source asks CLIP's text encoder how like a token is to the question; here the words' own embeddings say it, since
    language models do not bring that encoder along. The released code differs in three things, in which ``faithful_code`` follows
    it: what is salient counts in the outliers of likeness too, with the least of all; the number of centres is a share of the
    main tokens, not of the rest; and the rest's keys are looked up by places in the rest, which are other tokens' keys.
    """

    id: ClassVar[str] = "recoverable_compression"
    paper: ClassVar[str] = "Recoverable Compression: Visual Token Recovery Guided by Text Information (2024)"
    verbs: ClassVar[tuple[str, ...]] = ("drop", "merge")

    near: int = parameter(32, "rest tokens that a centre takes in", least=0, search=(8,))
    text: float = parameter(1.8, "weight of the likeness to the question beside the cosine of keys", least=0, search=())
    neighbours: int = parameter(20, "neighbours in value of the outlier factor; half as many among the rest", least=2, search=())
    faithful_code: bool = parameter(False, "as released: other counts of outliers, and keys of other tokens", search=())

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", -1), Want("keys", -1)}

    def reduce(self, picture: Picture, k: int) -> Reduction:
        cells, salience = picture.cells, picture.salience(-1)
        asked = likeness(picture)
        salient, wanted, centres = (int(c) for c in self.counts(salience[cells], asked[cells], k))
        main = top(salience, salient, cells)
        rest = cells[~torch.isin(cells, main)]
        main = torch.cat([main, top(asked, wanted, rest)])
        rest = cells[~torch.isin(cells, main)]
        into = torch.full((len(picture.layout),), -1, device=picture.features.device)
        into[main] = main
        features = picture.features.float().clone()
        middle = top(salience, centres, rest)
        self._condense(picture, features, into, middle, rest, salience, asked, k > len(main) + len(middle))
        kept = (into == torch.arange(len(into), device=into.device)).nonzero()[:, 0]
        missing = k - len(kept)
        if missing > 0:  # there was no rest for a last token
            extra = top(salience, missing, cells[~torch.isin(cells, kept)])
            into[extra] = extra
            kept = torch.cat([kept, extra]).sort().values
        return Reduction(kept, features[kept], into, salience)

    def counts(self, salience: torch.Tensor, asked: torch.Tensor, k: int) -> torch.Tensor:
        """How many salient tokens, recovered ones and centres: with the last token, if any, exactly ``k``."""
        seen = max(1, round(len(salience) * outliers(salience, self.neighbours)))
        order = salience.argsort(descending=True, stable=True)
        others = asked[order[seen:]]
        judged = asked.index_fill(0, order[:seen], float(asked.min())) if self.faithful_code else others
        wanted = round(len(others) * outliers(judged, self.neighbours))
        left = max(0, len(salience) - seen - wanted)
        of = seen + wanted if self.faithful_code else left
        centres = round(of * outliers(salience.sort(descending=True).values[seen:], self.neighbours // 2))
        weights = torch.tensor([seen, wanted, centres], dtype=torch.float64)
        return largest_remainder(weights, torch.tensor(max(1, k - 1)), torch.full((3,), len(salience)))

    def _condense(
        self, picture: Picture, features: torch.Tensor, into: torch.Tensor, middle: torch.Tensor, rest: torch.Tensor,
        salience: torch.Tensor, asked: torch.Tensor, room: bool,
    ) -> None:  # fmt: skip
        """Puts what becomes of ``rest`` into ``features`` and ``into``: centres ``middle``, and with ``room`` one more token."""
        keys = torch.nn.functional.normalize(picture.keys(-1), dim=-1)
        if self.faithful_code:
            keys = keys.index_copy(0, rest, keys[picture.cells[: len(rest)]])
        whole = picture.features.float()
        for centre in middle.tolist():
            others = rest[rest != centre]
            like = keys[others] @ keys[centre] + self.text * asked[others]
            near = others[like.argsort(descending=True, stable=True)[: self.near]]
            features[centre] = whole[centre] + (salience[near, None] * whole[near]).sum(0)
            into[near[into[near] < 0]] = centre
        into[middle] = middle
        left = rest[~torch.isin(rest, middle)]
        if room and len(left):
            last = int(left[salience[left].argmax()])
            features[last] = (salience[left, None] * whole[left]).sum(0)
            into[left] = torch.where(into[left] < 0, last, into[left])
            into[last] = last


def likeness(picture: Picture) -> torch.Tensor:
    """Cosine of each token with the mean of the words behind the picture, ``(n,)``."""
    mean = torch.nn.functional.normalize(picture.question.float(), dim=-1).mean(0)
    return torch.nn.functional.cosine_similarity(picture.features.float(), mean[None], dim=-1)


def outliers(values: torch.Tensor, neighbours: int) -> float:
    """Share of ``values`` (n,) whose local outlier factor is above 1.5 (LOF, 2000): of lower density than their neighbours'."""
    count = len(values)
    near = min(neighbours, count - 1)
    if near < 1:
        return 0.0
    ordered = values.double().sort().values
    distance = (ordered[:, None] - ordered[None]).abs()
    distance.fill_diagonal_(float("inf"))
    nearest, index = distance.topk(near, largest=False)
    reach = torch.maximum(nearest[:, -1][index], nearest)
    density = 1 / (reach.mean(-1) + 1e-10)
    return float((density[index].mean(-1) / density > OUTLIER).double().mean())
