"""Draft trees: what is derived of a shape equals walking it node by node."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.decoding.tree import NONE, DraftTree, TreeShape, trie


@st.composite
def shapes(draw):
    nodes = draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        real = draw(st.integers(1, nodes))
        rows.append([NONE] + [draw(st.integers(0, i - 1)) for i in range(1, real)] + [NONE] * (nodes - real))
    return rows


def walk(parents, node):
    path = []
    while node > 0:
        path.insert(0, node)
        node = parents[node]
    return [0, *path]


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_everything_derived_equals_a_walk(rows):
    shape = TreeShape(torch.tensor(rows))
    for row, parents in enumerate(rows):
        for node in range(len(parents)):
            if node and parents[node] == NONE:
                assert not shape.real[row, node] and not shape.ancestors[row, node].any() and shape.depths[row, node] == -1
                continue
            path = walk(parents, node)
            assert shape.real[row, node]
            assert shape.ancestors[row, node].nonzero()[:, 0].tolist() == sorted(path)
            assert shape.depths[row, node] == len(path) - 1
            children = [i for i, parent in enumerate(parents) if parent == node]
            assert [c for c in shape.children[row, node].tolist() if c >= 0] == children
            ends = torch.zeros(len(rows), dtype=torch.int64)
            ends[row] = node
            assert [i for i in shape.paths(ends)[row].tolist() if i >= 0] == path


def test_a_fixed_tree_of_rank_paths_stands_level_by_level():
    shape = TreeShape.of_paths([[1], [0], [0, 1], [0, 0], [1, 0], [0, 0, 0]])
    assert shape.parents.tolist() == [[NONE, 0, 0, 1, 1, 2, 3]]
    assert shape.ranks.tolist() == [[0, 0, 1, 0, 1, 0, 0]]
    assert shape.depth == 3
    grown = shape.expand(3)
    assert grown.children.shape[0] == 3 and grown.paths(torch.tensor([6, 0, 5])).tolist() == [
        [0, 1, 3, 6], [0, -1, -1, -1], [0, 2, 5, -1]
    ]  # fmt: skip


def test_continuations_share_what_they_begin_with():
    tokens, parents = trie(9, [[1, 2, 3], [1, 4], [5]], limit=10)
    assert (tokens, parents) == ([9, 1, 2, 3, 4, 5], [NONE, 0, 1, 2, 1, 0])
    assert trie(9, [[1, 2, 3], [1, 4], [5]], limit=3) == ([9, 1, 2, 3], [NONE, 0, 1, 2])


def test_rows_of_different_size_are_filled_up():
    tree = DraftTree.of_rows([([7, 1, 2], [NONE, 0, 0]), ([8], [NONE])])
    assert tree.tokens.tolist() == [[7, 1, 2], [8, 0, 0]]
    assert tree.shape.real.tolist() == [[True] * 3, [True, False, False]]
    assert DraftTree.chain(torch.tensor([[1, 2, 3]])).shape.parents.tolist() == [[NONE, 0, 1]]
