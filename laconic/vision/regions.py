"""Budgets for the regions of a picture: its crops, or stretches of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from laconic.primitives.allocate import largest_remainder
from laconic.vision.picture import Layout, Picture
from laconic.vision.select import top


def share_out(weights: torch.Tensor, k: int, caps: torch.Tensor) -> torch.Tensor:
    """``k`` tokens among regions in proportion to ``weights`` (regions,), at most ``caps`` (regions,) each: exact, int64."""
    return largest_remainder(weights.double(), torch.tensor(k, device=weights.device), caps)


def top_of_regions(scores: torch.Tensor, members: list[torch.Tensor], quotas: torch.Tensor) -> torch.Tensor:
    """The best ``quotas`` (regions,) tokens of each region's ``members``, together in ascending order."""
    return torch.cat([top(scores, int(k), among) for among, k in zip(members, quotas.tolist(), strict=True)]).sort().values


def crop_members(layout: Layout) -> list[torch.Tensor]:
    """The tokens of every crop, int64 ascending."""
    return [(layout.crop == crop).nonzero()[:, 0] for crop in range(len(layout.shapes))]


def floors(weights: torch.Tensor, k: int) -> torch.Tensor:
    """As ``share_out``, rounded down without caps, so that tokens are left over: as released codes do. Equal without weights."""
    weights = weights.double() if float(weights.sum()) > 0 else torch.ones_like(weights, dtype=torch.float64)
    return (k * weights / weights.sum() + 1e-9).long()


def stretches(among: torch.Tensor, count: int) -> list[torch.Tensor]:
    """``among`` (c,) cut into ``count`` pieces, the first ones a token longer where it does not divide."""
    return list(torch.tensor_split(among, max(1, min(count, len(among)))))


def tiles(layout: Layout, count: int) -> list[torch.Tensor]:
    """The crops cut into rectangles of nearly equal sides, about ``count`` of them together, int64 ascending each.

    Every crop is at least one; what shows no token is left out.
    """
    side = math.sqrt(sum(h * w for h, w in layout.shapes) / max(1, count))
    found = []
    for crop, (height, width) in enumerate(layout.shapes):
        here = (layout.crop == crop).nonzero()[:, 0]
        down, across = (max(1, min(size, round(size / side))) for size in (height, width))
        tile = layout.row[here] * down // height * across + layout.column[here] * across // width
        found += [here[tile == number] for number in tile.unique()]
    return found


def pieces_of(cells: int, k: int) -> int:
    """How many pieces HoloV (2025) cuts ``cells`` tokens into: one holds about half as many tokens as are kept."""
    return max(1, 16 * cells // (9 * k))


def by_size(picture: Picture, worth: torch.Tensor, k: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The crops, each weighing as much as it has tokens."""
    members = crop_members(picture.layout)
    return members, torch.tensor([float(len(part)) for part in members], device=worth.device)


def by_worth(members: list[torch.Tensor], worth: torch.Tensor, total: bool) -> torch.Tensor:
    """The sum, or else the mean, of each region's worth, counted from 0 or from the lowest token's where that is below 0."""
    worth = worth - min(0.0, *(float(worth[part].min()) for part in members if len(part)))
    return torch.stack([worth[part].sum() if total else worth[part].mean() for part in members]).nan_to_num(0.0)


def salient_crops(picture: Picture, worth: torch.Tensor, k: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The crops, each weighing what its tokens are worth together (HiRED, 2024)."""
    members = crop_members(picture.layout)
    return members, by_worth(members, worth, total=True)


def salient_tiles(picture: Picture, worth: torch.Tensor, k: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rectangles of tokens, each weighing what its tokens are worth in the mean (HoloV, 2025)."""
    members = tiles(picture.layout, pieces_of(len(picture.cells), k))
    return members, by_worth(members, worth, total=False)


def salient_stretches(picture: Picture, worth: torch.Tensor, k: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Stretches of tokens, each weighing what its tokens are worth in the mean (HoloV's released code, 2025)."""
    members = stretches(picture.cells, pieces_of(len(picture.cells), k))
    return members, by_worth(members, worth, total=False)


REGIONS: dict[str, Callable[[Picture, torch.Tensor, int], tuple[list[torch.Tensor], torch.Tensor]]] = {
    "whole": lambda picture, worth, k: ([picture.cells], torch.ones(1, device=worth.device)),
    "crops": by_size,
    "salient_crops": salient_crops,
    "salient_tiles": salient_tiles,
    "salient_stretches": salient_stretches,
}


def place_in_whole(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token of the parts lies in the whole picture, as shares of its height and width: ``(n,)`` each, 0..1.

    The whole picture covers what is left of the parts when their padding is cut off. Tokens of crop 0 and separators are NaN.
    """
    height, width = layout.shapes[0]
    columns = max(1, layout.parts[1])
    part = (layout.crop - 1).clamp(min=0)
    row = (part // columns * height + layout.row).float()
    column = (part % columns * width + layout.column).float()
    own = layout.crop > 0
    if not bool(own.any()):
        return row.fill_(float("nan")), column.fill_(float("nan"))
    shares = []
    for at in (row, column):
        low, high = at[own].min(), at[own].max() + 1
        shares.append(((at + 0.5 - low) / (high - low)).masked_fill(~own, float("nan")))
    return shares[0], shares[1]


def whole_cells_of_parts(layout: Layout) -> torch.Tensor:
    """For each cell of the whole picture, row by row, the part that shows it: int64 ``(height * width,)``, counted from 1."""
    height, width = layout.shapes[0]
    rows, columns = layout.parts
    down, across = place_in_whole(layout)
    part = layout.crop - 1
    row = torch.bucketize((torch.arange(height) + 0.5) / height, _ends(down, part // columns, rows)).clamp(max=rows - 1)
    column = torch.bucketize((torch.arange(width) + 0.5) / width, _ends(across, part % columns, columns)).clamp(max=columns - 1)
    return (1 + row[:, None] * columns + column[None]).flatten()


def even_cells_of_parts(layout: Layout) -> torch.Tensor:
    """As ``whole_cells_of_parts``, as if no part had padding: the parts divide the whole evenly, the last ones take the rest."""
    number = [
        (torch.arange(size) // max(1, size // parts)).clamp(max=parts - 1)
        for size, parts in zip(layout.shapes[0], layout.parts, strict=True)
    ]
    return (1 + number[0][:, None] * layout.parts[1] + number[1][None]).flatten()


def _ends(share: torch.Tensor, number: torch.Tensor, count: int) -> torch.Tensor:
    """Where each of ``count`` rows or columns of parts ends, as a share of the whole; empty ones end where they begin."""
    ends, last = [], 0.0
    for i in range(count):
        own = share[(number == i) & ~share.isnan()]
        last = float(own.max()) if len(own) else last
        ends.append(last)
    return torch.tensor(ends)
