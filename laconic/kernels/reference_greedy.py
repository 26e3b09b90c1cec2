"""The greedy choice in plain torch: after every pick, the gain of every token; one loop, and what each rule keeps up to date;
and the most isolated token."""

from __future__ import annotations

import torch

RULES = ("max", "sum", "distance", "coverage", "determinant")
BLOCK = 256  # tokens whose cosines with all others are held at a time
ROUNDING = 1e-6  # nearest cosines that differ by less are equal: two tokens that are nearest to each other have the same one
EXHAUSTED = 1e-5  # a squared residual below this share of the squared norm is rounding in float32: the token adds nothing


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows (..., d) of length 1 in float32; a row of zeros stays."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)


class Similar:
    """offset - weight * s: s is the largest cosine to a picked token, their sum, or minus the smallest squared distance."""

    def __init__(self, rule: str, rows: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor) -> None:
        self.rule, self.weight, self.offset = rule, weight, offset
        self.rows = rows.float() if rule == "distance" else unit(rows)
        self.similarity: torch.Tensor | None = None

    def gain(self) -> torch.Tensor:
        return self.offset if self.similarity is None else self.offset - self.weight * self.similarity

    def add(self, pick: torch.Tensor) -> None:
        picked = self.rows[torch.arange(len(pick), device=pick.device), pick]
        if self.rule == "distance":
            new = -(self.rows - picked[:, None]).square().sum(-1)
        else:
            new = (self.rows @ picked[..., None])[..., 0]
        if self.similarity is not None:
            new = self.similarity + new if self.rule == "sum" else torch.maximum(self.similarity, new)
        self.similarity = new


class Coverage:
    """weight * sum over things of what a token covers beyond the best picked one; what is below 0 covers nothing."""

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        self.rows, self.weight = rows.float(), weight
        self.cover = torch.zeros_like(self.rows[:, :1])

    def gain(self) -> torch.Tensor:
        return self.weight * (self.rows - self.cover).clamp(min=0).sum(-1)

    def add(self, pick: torch.Tensor) -> None:
        self.cover = torch.maximum(self.cover, self.rows[torch.arange(len(pick), device=pick.device), pick][:, None])


class Determinant:
    """What a token multiplies the determinant of the picked ones' kernel weight_i weight_j cos(i, j) by: its squared residual.

    Each pick adds a column to the Cholesky factor of the kernel (Chen, Zhang and Zhou, 2018).
    """

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor, count: int) -> None:
        self.rows, self.weight = unit(rows) * weight[..., None], weight
        self.factor = torch.zeros(*weight.shape, count, device=rows.device)
        self.residual = weight.square()
        self.picks = 0

    def gain(self) -> torch.Tensor:
        return self.residual

    def add(self, pick: torch.Tensor) -> None:
        at = torch.arange(len(pick), device=pick.device), pick
        explained = (self.factor @ self.factor[at][..., None])[..., 0]
        pivot = self.residual[at][:, None]
        column = ((self.rows @ self.rows[at][..., None])[..., 0] - explained) * pivot.clamp(min=1e-30).rsqrt()
        column = column.masked_fill(pivot <= 0, 0.0)  # a pick that added nothing explains nothing
        self.factor[..., self.picks] = column
        left = self.residual - column.square()
        self.residual = left.masked_fill(left <= EXHAUSTED * self.weight.square(), 0.0)
        self.picks += 1


def greedy(
    rule: str,
    rows: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    usable: torch.Tensor,
    seeds: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    longest = int(counts.max())
    rows = rows.masked_fill(~usable[..., None], 0.0)
    state: Similar | Coverage | Determinant
    if rule == "coverage":
        state = Coverage(rows, weight)
    elif rule == "determinant":
        state = Determinant(rows, weight, longest)
    else:
        state = Similar(rule, rows, weight, offset)
    free = usable.clone()
    order = torch.full((len(counts), longest), -1, dtype=torch.int64, device=rows.device)
    for t in range(longest):
        pick = state.gain().masked_fill(~free, float("-inf")).argmax(-1)  # the first of equal ones
        if t == 0:
            pick = torch.where(seeds >= 0, seeds, pick)
        free.scatter_(1, pick[:, None], False)
        order[:, t] = torch.where(t < counts, pick, -1)
        state.add(pick)
    return order


def most_isolated(directions: torch.Tensor) -> int:
    """Of rows (n, d) of length 1, the one whose largest cosine with another is least, the lowest of equal ones.

    The blocks, each twice as large as the one before, are strided over the tokens, so that even the first holds a neighbour in
    the image of every token. Its tokens are compared with all: the best of them is the mark that the others have to beat.
    """
    n = len(directions)
    stride = -(-n // BLOCK)
    order = torch.cat([torch.arange(first, n, stride, device=directions.device) for first in range(stride)])
    mine, rows = torch.arange(n, device=directions.device), directions  # the tokens still in the running
    nearest = directions.new_full((n,), float("-inf"))
    mark, begin, size = float("inf"), 0, -(-n // stride)
    while begin < n:
        others = order[begin : begin + size]
        cosines = rows @ directions[others].T
        cosines.masked_fill_(mine[:, None] == others, float("-inf"))
        nearest = torch.maximum(nearest, cosines.amax(1))
        candidates = cosines.amax(0) if begin == 0 else _nearest_of(rows[nearest.argmin()], mine[nearest.argmin()], directions)
        mark = min(mark, float(candidates.min()))
        stays = nearest <= mark + 2 * ROUNDING
        mine, rows, nearest = mine[stays], rows[stays], nearest[stays]
        begin, size = begin + size, 2 * size
    return int(mine[nearest <= nearest.min() + ROUNDING][0])


def _nearest_of(row: torch.Tensor, index: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The largest cosine of one token with all others."""
    return (directions @ row).index_fill(0, index, float("-inf")).amax()
