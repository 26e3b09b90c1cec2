"""What becomes of tokens that are not kept: they join others. A merge says where each goes, and moves any tensor along."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Merge:
    """Which token each token goes into.

    Attributes:
        into: int64 ``(n,)``: the number of a kept token, itself for those; -1 for a token that is lost.
    """

    into: torch.Tensor

    @property
    def kept(self) -> torch.Tensor:
        """The tokens that stay, int64 ascending."""
        return (self.into == torch.arange(len(self.into), device=self.into.device)).nonzero()[:, 0]

    def mean(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of the members of each kept token, ``(kept, width)`` of ``values`` (n, width), as float32.

        Args:
            weights: ``(n,)``, not negative; where those of all members are 0, the plain mean.
        """
        real = self.into >= 0
        weights = torch.ones(len(values), device=values.device) if weights is None else weights.float()
        target = self.into.clamp(min=0)
        none = torch.zeros(len(values), device=values.device).index_add_(0, target[real], weights[real]) <= 0
        weights = torch.where(none[target], torch.ones_like(weights), weights)[real]
        total = torch.zeros(len(values), device=values.device).index_add_(0, target[real], weights)
        summed = torch.zeros(values.shape, device=values.device, dtype=torch.float32)
        summed.index_add_(0, target[real], weights[:, None] * values[real].float())
        return (summed / total[:, None].clamp(min=1e-12))[self.kept]

    def of_others(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of those that joined each kept token, without itself, ``(kept, width)`` of ``values`` (n, width) as float32, 0
        where nobody did; and how many they are, float32 ``(kept, 1)``."""
        joins = (self.into >= 0) & (self.into != torch.arange(len(self.into), device=self.into.device))
        total = torch.zeros(values.shape, device=values.device).index_add_(0, self.into[joins], values[joins].float())
        count = torch.bincount(self.into[joins], minlength=len(values)).float()[:, None]
        return (total / count.clamp(min=1))[self.kept], count[self.kept]


def join_nearest(keys: torch.Tensor, targets: torch.Tensor, movers: torch.Tensor) -> torch.Tensor:
    """For each of ``movers`` (m,) the one of ``targets`` (t,) with the largest cosine of ``keys`` (n, dim); ties to the first."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    return targets[(unit[movers] @ unit[targets].t()).argmax(-1)]


def kmeans(features: torch.Tensor, count: int, iterations: int = 10, seed: int = 0) -> torch.Tensor:
    """Clusters of directions: the number of each row's cluster, int64 ``(n,)``, by k-means on the unit sphere from ``seed``.

    A centre that loses all its members moves to the row that is farthest from its own centre.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    count = min(count, len(unit))
    start = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:count].to(unit.device)
    centres = unit[start]
    for _ in range(iterations):
        likeness, member = (unit @ centres.t()).max(-1)
        sums = torch.zeros_like(centres).index_add_(0, member, unit)
        empty = torch.bincount(member, minlength=count) == 0
        lonely = likeness.argsort()[: int(empty.sum())]
        sums[empty] = unit[lonely]
        centres = torch.nn.functional.normalize(sums, dim=-1)
    return (unit @ centres.t()).argmax(-1)


def density_peaks(points: torch.Tensor, count: int, neighbours: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters around density peaks (Clustering by fast search and find of density peaks, 2014, with the density of the nearest
    neighbours): a centre has close neighbours and is far from all denser points. Ties go to the first. For few points: holds
    their n x n distances.

    Returns:
        the numbers of the ``count`` centres among ``points`` (n, dim), ascending, and for each point the number of its nearest
        centre, int64 ``(n,)``.
    """
    distance = torch.cdist(points.float(), points.float()) / points.shape[1] ** 0.5
    near = distance.topk(min(neighbours + 1, len(points)), largest=False).values[:, 1:]  # the first one is the point itself
    density = -near.square().mean(-1).nan_to_num(0.0)  # a logarithm: far from all others it would be 0 otherwise
    number = torch.arange(len(points), device=points.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (number < number[:, None]))
    apart = distance.masked_fill(~denser, float("inf")).amin(-1).clamp(max=float(distance.amax()))
    order = (density + apart.log()).argsort(descending=True, stable=True)
    centres = order[:count].sort().values
    member = centres[distance[:, centres].argmin(-1)]
    return centres, member.index_copy(0, centres, centres)


def bipartite(keys: torch.Tensor, among: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching (Token Merging, 2022): of every second token of ``among`` (c,) the ``count`` that are most like one
    of the others.

    Returns:
        the tokens that go, most alike first, and for each the one that it goes into; int64 ``(min(count, c // 2),)``. Its first,
        third, ... token are those that may go.
    """
    movers, targets = among[0::2], among[1::2]
    count = min(count, len(targets))
    if not count:
        return movers[:0], targets[:0]
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    best, partner = (unit[movers] @ unit[targets].t()).max(-1)
    order = best.argsort(descending=True, stable=True)[:count]
    return movers[order], targets[partner[order]]
