"""VFlowOpt: one map says what stays, and cells of the grid gather the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.primitives.merge import Merge
from laconic.registry import register
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture

MAP_WANTS = {Want("received", -2), Want("queries", -2), Want("keys", -2)}


@register
@dataclass(frozen=True, kw_only=True)
class VFlowOpt(VisionMethod):
    """Keeps the tokens that the picture's own sinks attend to, and gathers the others into one token per cell of a coarse grid.

    Sinks are tokens that receive more than ``sinks`` times the mean attention in the block before the last; where there is none,
    all vote. The lowest tokens are grouped by cells of ``cell`` x ``cell``, and each cell becomes, at the place of its best
    member, their mean weighted by the map; as many of the lowest are grouped as makes the number that is left exact. ``laconic
    tune`` finds ``sinks`` and ``cell`` for a workload, as the source searches them for a model. Its two further drops inside the
    language model by the same map are ``vflowopt_layers``: ``vflowopt:30% + vflowopt_layers:25%``. The entropy of pixels, which
    its own search set to nothing, is left out.
    """

    id: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization (2025)"
    verbs: ClassVar[tuple[str, ...]] = ("drop", "merge")

    sinks: float = parameter(4.0, "times the mean attention from which a token votes", least=0, search=(0.0, 2.0, 10.0, 30.0))
    cell: float = parameter(4.0, "side of a cell in tokens", least=1, search=(2.0, 8.0, 12.0))

    def wants(self, depth: int) -> set[Want]:
        return MAP_WANTS

    def reduce(self, picture: Picture, k: int) -> Reduction:
        worth = sink_map(picture, self.sinks)
        cells = picture.cells
        order = cells[worth[cells].argsort(stable=True)]  # the lowest first
        side, low = self.cell, None
        while low is None:
            place = self.place(picture, side)[order]
            low, side = lowest(place.tolist(), k), 2 * side  # a grid of more cells than the budget is too fine
        into = torch.full((len(picture.layout),), -1, device=worth.device)
        into[cells] = cells
        gathered, number = order[:low], place[:low]
        for cell in number.unique().tolist():
            members = gathered[number == cell]
            into[members] = members[worth[members].argmax()]
        merge = Merge(into)
        return Reduction(merge.kept, merge.mean(picture.features, worth), into, worth)

    def place(self, picture: Picture, side: float) -> torch.Tensor:
        """The number of each token's cell of ``side`` x ``side``, int64 ``(n,)``; crops share cells once these are as large."""
        layout = picture.layout
        rows, columns = (layout.row.float() / side).floor().long(), (layout.column.float() / side).floor().long()
        crop = layout.crop // max(1, int(side) // max(layout.shapes[0]))
        return ((crop * 4096 + rows) * 4096 + columns).to(picture.features.device)


def sink_map(picture: Picture, sinks: float) -> torch.Tensor:
    """Mean attention to every token, ``(n,)``, of those that receive more than ``sinks`` times the mean; of all where none
    does."""
    first = int(picture.trace.has_class)
    query, keys = (picture.recorded(kind, -2).float() for kind in ("queries", "keys"))
    received = picture.recorded("received", -2)
    sums = torch.zeros_like(received)
    for crop in range(len(received)):
        voters = (received[crop] > sinks * received[crop].mean()).nonzero()[:, 0]
        if not len(voters):
            sums[crop] = received[crop]
            continue
        logits = query[crop][:, voters + first] @ keys[crop].transpose(-1, -2) * query.shape[-1] ** -0.5
        sums[crop] = logits.softmax(-1).mean((0, 1))[first:]
    return picture.of_patches(sums, "sum")


def lowest(cells: list[int], k: int) -> int | None:
    """How many tokens, from the first on, have to go into their ``cells`` until ``k`` are left; None where that is not enough."""
    seen: set[int] = set()
    left = len(cells)
    for count, cell in enumerate(cells):  # one more disappears into a cell, or opens one
        if left == k:
            return count
        left -= cell in seen
        seen.add(cell)
    return len(cells) if left == k else None
