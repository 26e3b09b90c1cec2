"""Methods with a draft model, over tables: what they draft, and that the law stays the model's."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch

from laconic.decoding.draft_model import ModelDrafter
from laconic.decoding.dyspec import BestFirst, DySpec
from laconic.decoding.spectr import Drafts, SpecTr
from laconic.decoding.speculative import FixedTree, Speculative
from laconic.decoding.tree import DraftTree, TreeShape
from laconic.decoding.verify import k_seq, match, rejection
from tests.decoding.tables import draft
from tests.decoding.test_verify import ROWS, continued, dice, draw, fits


def laws(size: int = 3, seed: int = 1, sharp: float = 3.0) -> torch.Tensor:
    return (torch.rand(size, size, generator=dice(seed), dtype=torch.float64) * sharp).softmax(-1)


def first_three(tree: DraftTree, verifier, p: torch.Tensor, seed: int = 9) -> torch.Tensor:
    """How often each first three tokens came out, of a model with table p."""
    generator = dice(seed)
    verdict = match(tree, draw(p[tree.tokens], generator)) if verifier is match else verifier(tree, p[tree.tokens], generator)
    three = continued(tree, verdict, p, 3, generator)
    return torch.bincount(three @ torch.tensor([9, 3, 1]), minlength=27)


def law_of_three(p: torch.Tensor) -> torch.Tensor:
    return (p[0][:, None, None] * p[:, :, None] * p).flatten()


def follows_the_law(tree: DraftTree, verifier, p: torch.Tensor) -> bool:
    """Whether the first three tokens have the law of a model with table p."""
    return fits(first_three(tree, verifier, p), law_of_three(p))


@pytest.mark.parametrize(("kind", "method", "verifier"), [
    (FixedTree, Speculative(budget=3), rejection),
    (FixedTree, Speculative(branches="3x2", budget=9), rejection),
    (FixedTree, Speculative(branches="2x1", budget=4, verifier="match"), match),
    (Drafts, SpecTr(drafts=1, budget=2), k_seq),
    (Drafts, SpecTr(drafts=4, budget=12), k_seq),
    (Drafts, SpecTr(drafts=3, budget=6, verifier="match"), match),
], ids=str)  # fmt: skip
def test_the_first_three_tokens_follow_the_model(kind, method, verifier):
    tree = draft(kind, method, laws(seed=2), rows=ROWS)
    assert follows_the_law(tree, verifier, laws(seed=1))


@pytest.mark.parametrize("method", [
    Speculative(budget=3, confidence=0.4), Speculative(branches="2x1", budget=4, confidence=0.4),
], ids=str)  # fmt: skip
def test_drafts_that_end_where_they_are_unsure_follow_the_law(method):
    """One row at a time: a batch goes on while any row is sure."""
    p, q, counts, sizes = laws(seed=1), laws(seed=2), torch.zeros(27, dtype=torch.int64), set()
    for seed in range(4000):
        tree = draft(FixedTree, method, q, seed=2 * seed)
        sizes.add(tree.nodes)
        counts += first_three(tree, rejection, p, 2 * seed + 1)
    assert len(sizes) > 1, "some ended early, some did not"
    assert fits(counts, law_of_three(p))


GROWN = 10_000  # a wrong policy shifts some cell by 0.03, ten times what chance does here


@pytest.mark.parametrize("nodes", [2, 5])
@pytest.mark.parametrize("options", [{}, {"slot_value": "expected"}, {"threshold": 0.3}], ids=str)
def test_a_tree_that_grows_where_it_pays_follows_the_law(nodes, options):
    tree = draft(BestFirst, DySpec(budget=nodes, **options), laws(seed=2), rows=GROWN)
    assert follows_the_law(tree, rejection, laws(seed=1))


def test_keeping_the_best_of_what_was_drawn_would_not():
    """That the test above can fail: of a larger tree the nodes of largest probability stay, chosen after they were drawn."""
    q = laws(seed=2)
    tree = draft(FixedTree, Speculative(branches="3x3", budget=12), q, rows=GROWN)
    every = torch.arange(GROWN)
    value = torch.ones(GROWN, 13, dtype=torch.float64)
    for node in range(1, 13):
        above = tree.shape.parents[:, node]
        value[:, node] = value[every, above] * tree.laws[every, above, tree.tokens[:, node]]
    best = value.argsort(dim=-1, descending=True, stable=True)[:, :4].sort(-1).values
    stays = torch.zeros(GROWN, 13, dtype=torch.bool).scatter(1, best, True)
    parents = torch.where(stays, tree.shape.parents, -1)
    assert not follows_the_law(DraftTree(tree.tokens, TreeShape(parents), tree.laws), rejection, laws(seed=1))


def test_one_drafted_token_is_accepted_as_often_as_the_laws_overlap():
    p, q = laws(seed=1), laws(seed=2)
    for kind, method in ((FixedTree, Speculative(budget=1)), (BestFirst, DySpec(budget=1))):
        tree = draft(kind, method, q, rows=GROWN)
        accepted = rejection(tree, p[tree.tokens], dice(3)).accepted.double().mean()
        assert abs(float(accepted) - float(torch.minimum(p[0], q[0]).sum())) < 0.02


def slots(q: torch.Tensor, nodes: int, room: int) -> set[tuple[int, ...]]:
    """The paths that the published algorithm adds, with the likeliest token of each slot: a heap with whole residual rows."""
    heap = [(-1.0, 0, (), q[0].tolist())]
    came, paths = 1, set()
    while heap and len(paths) < nodes:
        value, _, path, row = heapq.heappop(heap)
        token = max(range(len(row)), key=row.__getitem__)
        chance = row[token]
        paths.add((*path, token))
        rest = [0.0 if i == token else other for i, other in enumerate(row)]
        if sum(rest) > 1e-12:
            heapq.heappush(heap, (value * (1 - chance), came, path, [other / sum(rest) for other in rest]))
        if len(path) + 1 < room:
            heapq.heappush(heap, (value * chance, came + 1, (*path, token), q[token].tolist()))
        came += 2
    return paths


def paths_of(tree: DraftTree, row: int = 0) -> set[tuple[int, ...]]:
    """The tokens on the way to each node."""
    ends = tree.shape.real[row].nonzero()[:, 0].tolist()[1:]
    ways = [tree.shape.ancestors[row, end].nonzero()[:, 0] for end in ends]
    found = [tuple(tree.tokens[row, way[1:]].tolist()) for way in ways]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("nodes", [1, 6, 20])
def test_for_a_greedy_model_the_best_slots_are_those_of_the_published_algorithm(seed, nodes):
    q = laws(7, seed, sharp=6.0)
    tree = draft(BestFirst, DySpec(budget=nodes, temperature=1.0), q, temperature=0.0, room=5)
    assert paths_of(tree) == slots(q, nodes, room=5) and tree.laws is None


def test_with_a_threshold_every_slot_above_it_is_filled():
    q = laws(4, 3, sharp=6.0)
    tree = draft(BestFirst, DySpec(budget=500, threshold=0.04, temperature=1.0), q, temperature=0.0, room=4)
    expected = set()
    for path in itertools.chain.from_iterable(itertools.product(range(4), repeat=n) for n in range(1, 5)):
        reach = 1.0
        for above, token in zip((0, *path), path, strict=False):
            reach *= float(q[above, token])
        last = q[path[-2] if len(path) > 1 else 0]
        likelier = float(last[last > last[path[-1]]].sum())
        if reach / float(last[path[-1]]) * (1 - likelier) > 0.04:
            expected.add(path)
    assert paths_of(tree) == expected and 10 < len(expected) < 300


def test_drafts_that_begin_alike_share_their_nodes():
    method = SpecTr(drafts=6, budget=18)
    tree = draft(Drafts, method, laws(seed=2), rows=50)
    for row in range(50):
        paths = {tuple(tree.tokens[row, nodes].tolist()) for nodes in tree.drafts[row]}
        assert paths_of(tree, row) == {path[:n] for path in paths for n in (1, 2, 3)}
        for nodes in tree.drafts[row].tolist():
            assert [int(tree.shape.parents[row, node]) for node in nodes] == [0, *nodes[:-1]]
    assert tree.nodes <= 1 + 3 + 6 + 6
    torch.testing.assert_close(tree.laws[:, 1], laws(seed=2)[tree.tokens[:, 1]], check_dtype=False)


def test_for_a_greedy_model_the_drafts_are_the_likeliest_continuations():
    q = laws(seed=5)
    tree = draft(Drafts, SpecTr(drafts=9, budget=27), q, temperature=0.0)
    chance = {(a, b, c): float(q[0, a] * q[a, b] * q[b, c]) for a, b, c in itertools.product(range(3), repeat=3)}
    best = sorted(chance, key=chance.get, reverse=True)[:9]
    assert {path for path in paths_of(tree) if len(path) == 3} == set(best)
    assert tree.drafts is None and tree.laws is None


def test_more_drafts_and_better_trees_are_accepted_more_often():
    """A sharp model of 40 tokens and a blurred copy of it that drafts, at temperature 1: the order of the cards.

    Where the draft model is unsure, yet right about how unsure to be, DySpec grows too wide and a chain is better.
    """
    p = (torch.randn(40, 40, generator=dice(1), dtype=torch.float64) * 4).softmax(-1)
    q = (p.log() + torch.randn(40, 40, generator=dice(2), dtype=torch.float64) * 2).softmax(-1)

    def emitted(kind: type[ModelDrafter], method, verifier, rows: int = 4000) -> float:
        tree = draft(kind, method, q, rows=rows)
        return 1 + float(verifier(tree, p[tree.tokens], dice(3)).accepted.double().mean())

    chains = [emitted(Drafts, SpecTr(drafts=k, budget=4 * k), k_seq) for k in (1, 2, 4, 8)]
    assert chains == sorted(chains) and chains[3] > chains[0] + 0.2
    chain = emitted(FixedTree, Speculative(budget=4, confidence=0.0), rejection)
    assert abs(chain - chains[0]) < 0.15
    for options in ({}, {"slot_value": "expected"}):
        grown = [emitted(BestFirst, DySpec(budget=m, **options), rejection, rows=800) for m in (4, 16, 28)]
        assert grown[2] > chain + 0.5 and grown == sorted(grown)


