"""The trees of Parallel Prompt Decoding: how many guesses to check, and how many prompt rows to put behind each of them.

State s is that s depths are guessed. Depths count as independent: ``accuracy[d][r]`` is how often the guess of rank r for depth
d + 1 is right.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from laconic.decoding.templates import best_tree, worths
from laconic.decoding.tree import NONE, TreeShape

Accuracy = tuple[tuple[float, ...], ...]
SIZES = 16  # numbers of guesses that are tried for each state, at most


@dataclass(frozen=True, eq=False)
class PromptTree:
    """What is checked in one state.

    Attributes:
        shape: of the guesses, ``(1, nodes)``, the root first. rows: prompt rows behind each node.
        stops: how likely each node is the last that is accepted.
    """

    shape: TreeShape
    rows: tuple[int, ...]
    stops: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Guesses expected to be accepted."""
        return float(sum(depth * chance for depth, chance in zip(self.shape.depths[0].tolist(), self.stops, strict=True)))


@functools.cache
def first_tree(ahead: int) -> PromptTree:
    """Nothing is guessed yet: the newest token, with all prompt rows."""
    return PromptTree(TreeShape.chain(0), (ahead,), (1.0,))


@functools.lru_cache(maxsize=64)
def plan(accuracy: Accuracy, limit: int) -> tuple[PromptTree, ...]:
    """The trees of the states 1 to ``len(accuracy)`` with the most tokens per forward that a search state by state finds.

    Args:
        limit: guesses and prompt rows of a forward; the root and its own rows are not among them.
    """
    ahead = len(accuracy)
    least, most = max(1, limit // (ahead + 1)), max(1, limit // 2)
    tried = range(least, most + 1, max(1, (most - least) // SIZES))
    sizes = [min(max(least, limit // 3), most)] * ahead
    best, better = tokens_per_forward(_trees(accuracy, sizes, limit)), True
    while better:
        better = False
        for state, size in itertools.product(range(ahead), tried):
            other = [*sizes[:state], size, *sizes[state + 1 :]]
            rate = tokens_per_forward(_trees(accuracy, other, limit))
            if rate > best + 1e-9:
                sizes, best, better = other, rate, True
    return _trees(accuracy, sizes, limit)


def best_plan(accuracy: Accuracy, rows: int) -> tuple[PromptTree, ...]:
    """The plan with as many depths as pay: where few rows can be computed, every prompt token costs guesses.

    Args:
        rows: behind the root in a forward, its own prompt rows among them; 3 or more.
    """
    plans = (plan(accuracy[:ahead], rows - ahead) for ahead in range(1, min(len(accuracy), rows - 2) + 1))
    return max(plans, key=tokens_per_forward)


def tokens_per_forward(trees: Sequence[PromptTree]) -> float:
    """Of the Markov chain in which the next state is the number of prompt rows behind the node where a forward stops."""
    moves = np.zeros((len(trees), len(trees)))
    for state, tree in enumerate(trees):
        np.add.at(moves[state], np.array(tree.rows) - 1, tree.stops)
    system = np.vstack([moves.T - np.eye(len(trees)), np.ones(len(trees))])
    often = np.linalg.lstsq(system, np.array([0.0] * len(trees) + [1.0]), rcond=None)[0]
    return 1 + float(often @ [tree.gain for tree in trees])


def best_length(accuracy: Accuracy, seconds: Sequence[tuple[int, float]], most: int) -> int:
    """Rows behind the root, at most ``most``, with which the most tokens are made in a second.

    Args:
        seconds: of a forward with so many rows in all, ascending; in between it is interpolated.
    """
    lengths = sorted({rows - 1 for rows, _ in seconds if 3 <= rows - 1 < most} | {most})
    rows, times = np.array(seconds).T

    def speed(length: int) -> float:
        return tokens_per_forward(best_plan(accuracy, length)) / float(np.interp(length + 1, rows, times))

    return max(lengths, key=speed)


def _trees(accuracy: Accuracy, sizes: Sequence[int], limit: int) -> tuple[PromptTree, ...]:
    """One tree for each state, of ``sizes`` guesses."""
    ahead = len(accuracy)
    shapes = [best_tree(accuracy[: state + 1], size) for state, size in enumerate(sizes)]
    stops = []
    for state, shape in enumerate(shapes):
        chance = worths(shape, accuracy[: state + 1])
        children = torch.zeros_like(chance).index_add(0, shape.parents[0, 1:], chance[1:])
        stops.append((chance - children).clamp(min=0).tolist())
    bare = [PromptTree(shape, (), tuple(stop)) for shape, stop in zip(shapes, stops, strict=True)]
    gains = [0.0, *(tree.gain for tree in bare)]
    rows = [(ahead, *_share(tree.stops[1:], gains, limit - tree.shape.nodes + 1)) for tree in bare]
    return tuple(PromptTree(tree.shape, count, tree.stops) for tree, count in zip(bare, rows, strict=True))


def _share(stops: Sequence[float], gains: Sequence[float], limit: int) -> list[int]:
    """Prompt rows behind each guess, ``limit`` in all: from all behind each, the least missed are taken away, one stays."""
    rows = [len(gains) - 1] * len(stops)
    heap = [(stop * (gains[-1] - gains[-2]), node) for node, stop in enumerate(stops)]
    heapq.heapify(heap)
    spare = sum(rows) - limit
    while spare > 0 and heap:
        _, node = heap[0]
        if rows[node] == 1:
            heapq.heappop(heap)
            continue
        rows[node] -= 1
        spare -= 1
        left = rows[node]
        heapq.heapreplace(heap, (stops[node] * (gains[left] - gains[left - 1]), node))
    return rows


@dataclass(frozen=True, eq=False)
class Layout:
    """The trees of a batch with their prompt rows.

    Attributes:
        nodes: shape of the guesses. whole: of guesses and, behind them, prompt rows.
        numbers: int64 ``(batch, rows)``: which of the prompt tokens each row is.
        first, count: int64 ``(batch, nodes)``: place of each node's first prompt row in ``whole``, and how many there are.
    """

    nodes: TreeShape
    whole: TreeShape
    numbers: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor


@functools.lru_cache(maxsize=256)
def lay_out(trees: tuple[PromptTree, ...], room: int) -> Layout:
    """One tree for each row of a batch, without what is deeper than ``room``; smaller ones are filled up with empty nodes."""
    cut = [_cut(tree, room) for tree in trees]
    nodes = max(len(parents) for parents, _ in cut)
    rows = max(sum(count) for _, count in cut)
    table = {name: torch.zeros(len(cut), size, dtype=torch.int64)
             for name, size in (("numbers", rows), ("first", nodes), ("count", nodes))}  # fmt: skip
    whole = torch.full((len(cut), nodes + rows), NONE)
    for row, (parents, count) in enumerate(cut):
        whole[row, : len(parents)] = torch.tensor(parents)
        at = nodes
        for node, many in enumerate(count):
            table["first"][row, node], table["count"][row, node] = at, many
            whole[row, at : at + many] = torch.tensor([node, *range(at, at + many - 1)][:many], dtype=torch.int64)
            table["numbers"][row, at - nodes : at - nodes + many] = torch.arange(many)
            at += many
    return Layout(TreeShape(whole[:, :nodes].clone()), TreeShape(whole), **table)


def _cut(tree: PromptTree, room: int) -> tuple[list[int], list[int]]:
    """Parents of the nodes, and how many prompt rows stand behind each, no deeper than ``room``. Nodes stand level by level."""
    depths = [depth for depth in tree.shape.depths[0].tolist() if depth <= room]
    parents = tree.shape.parents[0, : len(depths)].tolist()
    return parents, [min(many, room - depth) for depth, many in zip(depths, tree.rows, strict=False)]
