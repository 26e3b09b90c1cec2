"""The trees of Parallel Prompt Decoding against brute force and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.decoding import prompt_trees
from laconic.decoding.prompt_trees import best_length, best_plan, first_tree, lay_out, plan, tokens_per_forward
from laconic.decoding.templates import best_tree, worths
from tests.decoding.drafts import ACCURACY

TABLE = tuple(tuple(row) for row in ACCURACY)


@st.composite
def tables(draw):
    ranks = draw(st.integers(1, 3))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parts = sorted(draw(st.lists(st.integers(1, 30), min_size=ranks, max_size=ranks)), reverse=True)
        rows.append(tuple(part / 100 for part in parts))
    return tuple(rows)


def paths_of(shape):
    ranks = shape.ranks[0].tolist()
    return [tuple(ranks[i] for i in np.flatnonzero(row)[1:]) for row in shape.ancestors[0].numpy()]


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(1, 7))
def test_the_chosen_paths_are_the_best_of_all_rooted_sets(accuracy, nodes):
    every = [path for depth in range(1, len(accuracy) + 1) for path in itertools.product(range(len(accuracy[0])), repeat=depth)]
    worth = {path: float(np.prod([accuracy[d][r] for d, r in enumerate(path)])) for path in every}
    shape = best_tree(accuracy, nodes)
    chosen = paths_of(shape)[1:]
    assert len(set(chosen)) == len(chosen) == min(nodes, len(every))
    assert all(path[:-1] in chosen for path in chosen if len(path) > 1)
    top = sum(sorted(worth.values())[-len(chosen):])  # no set of any kind is worth more
    assert sum(worth[path] for path in chosen) == pytest.approx(top)
    assert worths(shape, accuracy).tolist() == pytest.approx([1, *(worth[path] for path in chosen)])


def test_the_best_rooted_set_is_found_by_exhaustion_too():
    accuracy = ((0.5, 0.3), (0.2, 0.1))
    every = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    worth = {path: float(np.prod([accuracy[d][r] for d, r in enumerate(path)])) for path in every}
    for count in range(1, 7):
        rooted = [set(s) for s in itertools.combinations(every, count) if all(len(p) == 1 or p[:1] in s for p in s)]
        best = max(sum(worth[p] for p in s) for s in rooted)
        assert sum(worth[p] for p in paths_of(best_tree(accuracy, count))[1:]) == pytest.approx(best)


@settings(max_examples=25, deadline=None)
@given(tables(), st.integers(2, 24))
def test_every_tree_keeps_to_the_limit(accuracy, limit):
    ahead = len(accuracy)
    trees = plan(accuracy, limit)
    assert len(trees) == ahead
    for state, tree in enumerate(trees, 1):
        assert tree.shape.depth <= state
        assert tree.rows[0] == ahead and all(1 <= count <= ahead for count in tree.rows)
        behind = tree.shape.nodes - 1 + sum(tree.rows[1:])
        assert behind <= limit
        assert behind == limit or all(count == ahead for count in tree.rows) or tree.shape.nodes - 1 <= limit // 2
        assert sum(tree.stops) == pytest.approx(1)
        assert tree.gain == pytest.approx(float(worths(tree.shape, accuracy)[1:].sum()))


def test_rows_are_taken_away_where_they_are_missed_least():
    shares = prompt_trees._share
    gains = [0.0, 0.5, 0.9, 1.0]  # the third row is worth 0.1, the second 0.4
    assert shares([0.5, 0.4, 0.1], gains, 9) == [3, 3, 3]
    assert shares([0.5, 0.4, 0.1], gains, 8) == [3, 3, 2]  # 0.01
    assert shares([0.5, 0.4, 0.1], gains, 7) in ([3, 2, 2], [3, 3, 1])  # 0.04 each
    assert shares([0.5, 0.4, 0.1], gains, 6) == [3, 2, 1]
    assert shares([0.5, 0.4, 0.1], gains, 2) == [1, 1, 1]  # one row stays everywhere


def test_the_rate_equals_a_simulation():
    trees = plan(TABLE, 12)
    generator, state, tokens, steps = np.random.default_rng(0), len(trees), 0, 10_000
    places = [dict(zip(paths_of(tree.shape), tree.rows, strict=True)) for tree in trees]
    chances = [np.array([*row, 1 - sum(row)]) for row in TABLE]
    for _ in range(steps):
        path, known = (), places[state - 1]
        right = [int(generator.choice(len(chance), p=chance)) for chance in chances]
        while len(path) < len(right) and (*path, right[len(path)]) in known:
            path = (*path, right[len(path)])
        tokens += len(path) + 1
        state = known[path]
    assert tokens / steps == pytest.approx(tokens_per_forward(trees), abs=0.03)
    assert tokens_per_forward(trees) > 1.5


def test_the_search_finds_the_best_sizes():
    accuracy, limit = TABLE[:2], 12
    sizes = range(limit // 3, limit // 2 + 1)
    best = max(tokens_per_forward(prompt_trees._trees(accuracy, pair, limit)) for pair in itertools.product(sizes, repeat=2))
    assert tokens_per_forward(plan(accuracy, limit)) == pytest.approx(best)


def test_more_rows_make_more_tokens():
    rates = [tokens_per_forward(plan(TABLE, limit)) for limit in (2, 6, 12, 24, 48)]
    assert rates == sorted(rates) and rates[-1] > rates[0]


def test_few_rows_are_spent_on_guesses_rather_than_on_more_prompt_tokens():
    depths = [len(best_plan(TABLE, rows)) for rows in (3, 6, 40, 100)]
    assert depths == sorted(depths) and depths[0] == 1 and depths[-1] == 3
    for rows in (5, 12, 40):
        rates = [tokens_per_forward(plan(TABLE[:ahead], rows - ahead)) for ahead in (1, 2, 3)]
        assert tokens_per_forward(best_plan(TABLE, rows)) == max(rates)


def test_the_length_is_where_tokens_per_second_peak():
    free = [(1, 1.0), (8, 1.0), (16, 1.0), (32, 1.0)]
    steep = [(1, 1.0), (8, 1.0), (16, 50.0), (32, 99.0)]
    assert best_length(TABLE, free, 40) == 40
    assert best_length(TABLE, steep, 40) == 7
    assert best_length(TABLE, steep, 6) == 6  # never more than the budget


def test_a_layout_puts_rows_behind_their_nodes():
    trees = (first_tree(3), *plan(TABLE, 9))
    layout = lay_out((trees[0], trees[2], trees[3]), room=10)
    for row, tree in enumerate((trees[0], trees[2], trees[3])):
        nodes = tree.shape.nodes
        assert layout.nodes.parents[row, :nodes].tolist() == tree.shape.parents[0].tolist()
        assert layout.count[row, :nodes].tolist() == list(tree.rows)
        for node, many in enumerate(tree.rows):
            for j in range(many):
                at = int(layout.first[row, node]) + j
                assert layout.numbers[row, at - layout.nodes.nodes] == j
                assert layout.whole.depths[row, at] == tree.shape.depths[0, node] + 1 + j
                way = {*range(int(layout.first[row, node]), at + 1), *tree.shape.ancestors[0, node].nonzero()[:, 0].tolist()}
                assert set(layout.whole.ancestors[row, at].nonzero()[:, 0].tolist()) == way
        assert int(layout.whole.real[row].sum()) == nodes + sum(tree.rows)


def test_nothing_stands_deeper_than_there_is_room():
    trees = plan(TABLE, 20)
    deepest = lay_out(trees, 99).whole.depth
    assert deepest > 3
    for room in range(1, 7):
        layout = lay_out(trees, room)
        assert layout.whole.depth == min(room, deepest)
