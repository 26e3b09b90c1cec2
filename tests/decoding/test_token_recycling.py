"""Token Recycling against its definition."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import get
from laconic.decoding.base import Step
from laconic.decoding.engine import decode
from laconic.decoding.sampling import Sampling, Text
from laconic.decoding.templates import best_tree, fill
from laconic.decoding.token_recycling import HITS
from laconic.decoding.verify import match
from tests import tiny

TREE = best_tree(HITS, 80)


def recycler(rows, recipe_budget="80", **parameters):
    text = Text(rows)
    setting = SimpleNamespace(text=text, model=tiny.shared("llama"), vocabulary=tiny.VOCABULARY, sampling=Sampling())
    return get("token_recycling", budget=recipe_budget, **parameters).drafter(setting), text


def way(shape, node, row=0):
    nodes = [node]
    while shape.parents[row, nodes[0]] >= 0:
        nodes.insert(0, int(shape.parents[row, nodes[0]]))
    return nodes


def test_the_tree_has_the_size_and_depth_of_the_original():
    assert TREE.nodes == 81 and TREE.depth == 6
    assert torch.bincount(TREE.depths[0]).tolist() == [1, 8, 23, 25, 17, 6, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_the_accepted_path_is_the_best_of_all(seed, vocabulary):
    random = torch.Generator().manual_seed(seed)
    successors = torch.rand(vocabulary, vocabulary, generator=random).argsort(-1)[:, :8].repeat(1, 8)[:, :8]
    tokens = fill(TREE, torch.zeros(1, dtype=torch.int64), successors)
    chosen = torch.randint(0, vocabulary, tokens.shape, generator=random)
    verdict = match(SimpleNamespace(tokens=tokens, shape=TREE), chosen)

    def reward(node):
        nodes = way(TREE, node)
        right = [int(tokens[0, b]) == int(chosen[0, a]) for a, b in pairwise(nodes)]
        return right.index(False) if False in right else len(right)

    best = max(range(TREE.nodes), key=reward)  # the first of equal ones
    nodes = way(TREE, best)[: reward(best) + 1]
    assert verdict.path[0, : len(nodes)].tolist() == nodes and bool((verdict.path[0, len(nodes) :] < 0).all())
    assert int(verdict.token) == int(chosen[0, nodes[-1]])
    assert len(nodes) <= 7


@pytest.mark.parametrize("seed", range(5))
def test_a_row_of_the_table_is_one_that_the_token_got_in_the_tree(seed):
    """The deepest accepted one where there is any, else the last; the same every time."""
    random = torch.Generator().manual_seed(seed)
    tables = []
    for _ in range(2):
        drafter, text = recycler([[3, 5], [9, 7]])
        drafter.table.copy_(torch.randint(0, 12, drafter.table.shape, generator=torch.Generator().manual_seed(seed)))
        before = drafter.table.clone()
        tree = drafter.propose(text, 100)
        scores = torch.randn(2, 81, tiny.VOCABULARY, generator=random.manual_seed(seed))
        scores[..., 12:] -= 100  # a few tokens only, so that some are accepted and many stand there twice
        verdict = match(tree, scores.argmax(-1))
        drafter.observe(Step(tree, None, scores, verdict), text)
        best = scores.topk(8, dim=-1).indices
        accepted = {(row, node) for row in range(2) for node in verdict.path[row].tolist() if node >= 0}
        places = {}
        for row in range(2):
            for node in range(81):
                places.setdefault(int(tree.tokens[row, node]), []).append((row, node))
        for token in range(tiny.VOCABULARY):
            at = places.get(token)
            if at is None:
                assert drafter.table[token].tolist() == before[token].tolist()
                continue
            row, node = max([place for place in at if place in accepted] or at, key=lambda place: place[::-1])
            assert drafter.table[token].tolist() == best[row, node].tolist()
        tables.append(drafter.table)
    assert torch.equal(*tables)


def test_an_empty_table_writes_a_token_in_every_forward():
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 20)
    told = []
    out = decode(model, inputs, "token_recycling:80", max_new_tokens=60, watch=told.append)
    assert all(1 <= len(step.new[0]) <= 7 for step in told)
    assert out.forwards <= 60


def test_whatever_the_table_holds_the_text_is_greedy():
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 30)
    plain = decode(model, inputs, max_new_tokens=40)
    drafter = decode(model, inputs, "token_recycling:80", max_new_tokens=2).drafter
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drafter.table = torch.randint(0, tiny.VOCABULARY, drafter.table.shape, generator=generator, dtype=torch.int32)
        assert decode(model, inputs, "token_recycling:80", max_new_tokens=40, drafter=drafter).rows == plain.rows


def test_the_prompt_teaches_the_newest_follower_first():
    drafter, _ = recycler([[4, 5, 4, 6, 4, 5, 8]], prompt=True, successors=3)
    assert drafter.table[4].tolist() == [5, 6, 0]
    assert drafter.table[5].tolist() == [8, 4, 0]
