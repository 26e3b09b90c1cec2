"""Fixed shapes of draft trees: rank paths by their worth."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

import torch

from laconic.decoding.tree import TreeShape


@functools.cache
def best_tree(accuracy: tuple[tuple[float, ...], ...], nodes: int) -> TreeShape:
    """The rooted tree of ``nodes`` rank paths with the largest sum of values, where the worth of a path is the product of
    ``accuracy[depth][rank]`` along it: the expected number of accepted tokens, were depths independent (Medusa, 2024).

    Args:
        accuracy: for each depth how often the candidate of each rank is right, 0 to 1, falling with the rank.
    """
    heap: list[tuple[float, tuple[int, ...]]] = [(-accuracy[0][0], (0,))]
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < nodes:
        worth, path = heapq.heappop(heap)
        chosen.append(path)
        depth, rank = len(path), path[-1]
        row = accuracy[depth - 1]
        if rank + 1 < len(row) and row[rank] > 0:  # the next sibling
            heapq.heappush(heap, (worth / row[rank] * row[rank + 1], (*path[:-1], rank + 1)))
        if depth < len(accuracy):  # the best child
            heapq.heappush(heap, (worth * accuracy[depth][0], (*path, 0)))
    return TreeShape.of_paths(chosen)


def fill(shape: TreeShape, roots: torch.Tensor, successors: torch.Tensor) -> torch.Tensor:
    """Tokens ``(batch, nodes)`` of a fixed tree, level by level: each node is its parent's successor of its own rank.

    Args:
        roots: int64 ``(batch,)``; successors: int64 ``(vocabulary, ranks)``.
    """
    tokens = roots[:, None].expand(-1, shape.nodes).clone()
    for at, parents, ranks in shape.levels:
        tokens[:, at] = successors[tokens[:, parents], ranks].to(tokens.dtype)
    return tokens


def worths(shape: TreeShape, accuracy: Sequence[Sequence[float]]) -> torch.Tensor:
    """float64 ``(nodes,)``: how likely each node of a fixed tree is right, as in ``best_tree``; 1 for the root."""
    depths, ranks = shape.depths[0], shape.ranks[0]
    own = torch.ones(shape.nodes, dtype=torch.float64)
    own[1:] = torch.tensor(accuracy, dtype=torch.float64)[depths[1:] - 1, ranks[1:]]
    return torch.where(shape.ancestors[0], own, 1.0).prod(-1)


def guessed(shape: TreeShape, roots: torch.Tensor, guesses: torch.Tensor) -> torch.Tensor:
    """Tokens ``(batch, nodes)`` of trees in which a node is the guess of its own rank for its depth, whatever stands before it.

    Args:
        roots: int64 ``(batch,)``; guesses: int64 ``(batch, depths, ranks)``.
    """
    place = (shape.depths - 1).clamp(min=0) * guesses.shape[2] + shape.ranks
    tokens = guesses.flatten(1).gather(1, place.to(guesses.device))
    tokens[:, 0] = roots
    return tokens
