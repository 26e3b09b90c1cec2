"""Verifiers: golden numbers, and tokens that follow the law of the model whatever is drafted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from laconic.decoding.tree import DraftTree, TreeShape
from laconic.decoding.verify import Verdict, division_factor, draw, draw_distinct, k_seq, match, rejection, typical

P = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
Q = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
ROWS = 100_000


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def fits(counts: torch.Tensor, law: torch.Tensor) -> bool:
    """Chi-square with a limit that a right law passes in all but one of some thirty thousand cases."""
    expected = law * counts.sum()
    cells = expected > 5
    chi = ((counts - expected) ** 2 / expected)[cells].sum()
    freedom = int(cells.sum()) - 1
    return float(chi) < freedom + 4 * (2 * freedom) ** 0.5 + 8


@pytest.mark.parametrize(("count", "rho"), [(1, 1.0), (2, 1.5), (3, 1.9395), (4, 2.314383), (8, 3.294602)])
def test_the_division_factor_of_the_golden_pair(count, rho):
    found = division_factor(P, Q, torch.tensor([count]))
    torch.testing.assert_close(found, torch.tensor([rho], dtype=torch.float64), atol=1e-4, rtol=0)


def test_equal_laws_and_strangers_need_no_division():
    assert division_factor(P, P, torch.tensor([4])).item() == 1
    apart = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]], dtype=torch.float64)
    assert division_factor(apart[:1], apart[1:], torch.tensor([3])).item() == 1


@pytest.mark.parametrize(("count", "accepted"), [(1, 0.6), (2, 0.75), (4, 0.831438), (8, 0.92946)])
def test_k_seq_accepts_as_often_as_it_should_and_keeps_the_law(count, accepted):
    drawn = draw(Q.expand(ROWS, count, 4), dice())
    tokens = torch.cat([torch.zeros(ROWS, 1, dtype=torch.int64), drawn], dim=1)
    shape = TreeShape(torch.tensor([[-1] + [0] * count])).expand(ROWS)
    drafts = torch.arange(1, count + 1).expand(ROWS, -1)[..., None]
    tree = DraftTree(tokens, shape, Q.expand(ROWS, count + 1, 4), drafts)
    verdict = k_seq(tree, P.expand(ROWS, count + 1, 4), dice(1))
    took = verdict.accepted > 0
    assert abs(float(took.double().mean()) - accepted) < 0.005
    first = torch.where(took, tokens.gather(1, verdict.path[:, 1:].clamp(min=0))[:, 0], verdict.token)
    assert fits(torch.bincount(first, minlength=4), P[0])


def optimum(p: np.ndarray, q: np.ndarray, count: int) -> float:
    """How often at best one of ``count`` draws from q can be made the token of the law p: the linear program."""
    tuples = list(itertools.product(range(len(p)), repeat=count))
    pairs = [(i, y) for i in range(len(tuples)) for y in range(len(p))]
    gain = [-float(y in tuples[i]) for i, y in pairs]
    sums = np.zeros((len(tuples) + len(p), len(pairs)))
    for column, (i, y) in enumerate(pairs):
        sums[i, column] = sums[len(tuples) + y, column] = 1
    totals = [np.prod(q[list(t)]) for t in tuples]
    return -linprog(gain, A_eq=sums, b_eq=np.concatenate([totals, p])).fun


def k_seq_accepts(p: torch.Tensor, q: torch.Tensor, count: int) -> float:
    rho = division_factor(p[None], q[None], torch.tensor([count]))
    return float(1 - (1 - torch.minimum(q, p / rho).sum()) ** count)


@pytest.mark.parametrize(("count", "best"), [(1, 0.6), (2, 0.79), (3, 0.871)])
def test_the_optimum_of_the_golden_pair(count, best):
    assert optimum(P[0].numpy(), Q[0].numpy(), count) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_k_seq_comes_near_the_optimum(seed):
    p, q = (torch.rand(2, 3, generator=dice(seed), dtype=torch.float64) * 5).softmax(-1)
    found = [k_seq_accepts(p, q, count) for count in (1, 2, 3, 4)]
    assert found == sorted(found)
    for count in (1, 2, 3):
        best = optimum(p.numpy(), q.numpy(), count)
        assert (1 - (1 - 1 / count) ** count) * best - 1e-9 <= found[count - 1] <= best + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_weights_that_do_not_sum_to_one_and_never_take_zeros(dtype):
    weights = torch.tensor([0, 3, 0, 1e-3, 2, 0], dtype=dtype)
    both = torch.stack([weights, weights.flip(0)]).expand(ROWS, 2, 6)
    drawn = draw(both, dice(1))
    assert drawn.shape == (ROWS, 2) and drawn.dtype == torch.int64
    for counts in (torch.bincount(drawn[:, 0], minlength=6), torch.bincount(5 - drawn[:, 1], minlength=6)):
        assert counts[weights == 0].sum() == 0 and counts[3] > 0
        assert fits(counts, (weights / weights.sum()).double())


def test_a_draw_of_one_without_replacement_is_a_draw():
    assert torch.equal(draw_distinct(Q.expand(50, 4), 1, dice(3))[:, 0], draw(Q.expand(50, 4), dice(3)))


def test_draws_without_replacement_come_in_the_order_of_sequential_draws():
    pairs = draw_distinct(Q.expand(ROWS, 4), 2, dice(2))
    q = Q[0]
    law = q[:, None] * q / (1 - q)[:, None]
    assert fits(torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16), law.fill_diagonal_(0).flatten())


@pytest.mark.parametrize(("count", "accepted"), [(1, 0.6), (2, 0.764), (4, 1.0)])
def test_rejection_without_replacement_of_the_golden_pair(count, accepted):
    tokens = torch.cat([torch.zeros(ROWS, 1, dtype=torch.int64), draw_distinct(Q.expand(ROWS, 4), count, dice())], dim=1)
    shape = TreeShape(torch.tensor([[-1] + [0] * count])).expand(ROWS)
    verdict = rejection(DraftTree(tokens, shape, Q.expand(ROWS, count + 1, 4)), P.expand(ROWS, count + 1, 4), dice(1))
    took = verdict.accepted > 0
    assert abs(float(took.double().mean()) - accepted) < 0.005
    first = torch.where(took, tokens.gather(1, verdict.path[:, 1:].clamp(min=0))[:, 0], verdict.token)
    assert fits(torch.bincount(first, minlength=4), P[0])


SHAPES = {"chain": [-1, 0, 1, 2], "fan": [-1, 0, 0, 0], "tree": [-1, 0, 0, 1, 1, 2, 3]}


def markov(seed: int, size: int = 3) -> torch.Tensor:
    """A random law of the next token after each token, (size, size)."""
    return torch.rand(size, size, generator=dice(seed), dtype=torch.float64).softmax(-1) ** 3


def drawn_tree(parents: list[int], q: torch.Tensor, generator) -> DraftTree:
    """Children drawn without replacement from the law after their parent; roots are token 0."""
    shape = TreeShape(torch.tensor([parents])).expand(ROWS)
    tokens = torch.zeros(ROWS, len(parents), dtype=torch.int64)
    laws = torch.zeros(ROWS, len(parents), q.shape[1], dtype=torch.float64)
    for node in range(len(parents)):
        laws[:, node] = q[tokens[:, node]]
        children = [i for i, parent in enumerate(parents) if parent == node]
        if children:
            tokens[:, children] = draw_distinct(laws[:, node], len(children), generator)
    return DraftTree(tokens, shape, laws)


def continued(tree: DraftTree, verdict: Verdict, p: torch.Tensor, count: int, generator) -> torch.Tensor:
    """The first ``count`` tokens of each text, (rows, count): the accepted ones, the verdict's, and what the model draws then."""
    accepted, last = verdict.accepted, verdict.token
    out = []
    for place in range(count):
        at = verdict.path[:, place + 1] if place + 1 < verdict.path.shape[1] else torch.full_like(last, -1)
        drafted = tree.tokens.gather(1, at.clamp(min=0)[:, None])[:, 0]
        drawn = draw(p[out[-1]], generator) if out else last
        out.append(torch.where(place < accepted, drafted, torch.where(place == accepted, last, drawn)))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_the_first_two_tokens_follow_the_model(name, verifier):
    p, q = markov(1), markov(2)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    tree = drawn_tree(SHAPES[name], q, dice(3))
    laws = p[tree.tokens]
    generator = dice(4)
    verdict = match(tree, draw(laws, generator)) if verifier == "match" else rejection(tree, laws, generator)
    two = continued(tree, verdict, p, 2, generator)
    assert fits(torch.bincount(two @ torch.tensor([3, 1]), minlength=9), (p[0][:, None] * p).flatten())


@pytest.mark.parametrize(("count", "length"), [(1, 2), (2, 2), (3, 3)])
def test_with_whole_drafts_the_first_three_tokens_follow_the_model(count, length):
    p, q = markov(1), markov(2)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    generator, nodes = dice(3), 1 + torch.arange(count * length).view(count, length)
    tokens = torch.zeros(ROWS, 1 + count * length, dtype=torch.int64)
    parents = torch.full((1 + count * length,), -1)
    for place in range(length):
        before = nodes[:, place - 1] if place else torch.zeros(count, dtype=torch.int64)
        parents[nodes[:, place]] = before
        tokens[:, nodes[:, place]] = draw(q[tokens[:, before]], generator)
    tree = DraftTree(tokens, TreeShape(parents[None]).expand(ROWS), q[tokens], nodes.expand(ROWS, -1, -1))
    three = continued(tree, k_seq(tree, p[tokens], generator), p, 3, generator)
    law = p[0][:, None, None] * p[:, :, None] * p
    assert fits(torch.bincount(three @ torch.tensor([9, 3, 1]), minlength=27), law.flatten())


def test_a_child_that_the_draft_model_cannot_have_drawn_is_passed_over():
    """With top-k the draft's law may end before a node has all its children."""
    q = torch.tensor([[0.7, 0.3, 0.0, 0.0]], dtype=torch.float64).expand(ROWS, 4)
    tokens = torch.cat([torch.zeros(ROWS, 1, dtype=torch.int64), draw_distinct(q, 4, dice())], dim=1)
    tree = DraftTree(tokens, TreeShape(torch.tensor([[-1, 0, 0, 0, 0]])).expand(ROWS), q[:, None].expand(-1, 5, -1))
    verdict = rejection(tree, P.expand(ROWS, 5, 4), dice(1))
    first = continued(tree, verdict, P.expand(4, 4), 1, dice(2))[:, 0]
    assert fits(torch.bincount(first, minlength=4), P[0])


def test_with_one_hot_rows_rejection_is_the_greedy_match():
    tree = drawn_tree(SHAPES["tree"], markov(2) / markov(2).sum(-1, keepdim=True), dice(5))
    chosen = torch.randint(0, 3, (ROWS, 7), generator=dice(6))
    greedy, random = match(tree, chosen), rejection(tree, torch.nn.functional.one_hot(chosen, 3).double(), dice(7))
    assert torch.equal(greedy.path, random.path) and torch.equal(greedy.token, random.token)


def test_of_equal_siblings_the_one_that_leads_further_is_followed():
    tree = DraftTree.of_rows([([5, 1, 1, 2], [-1, 0, 0, 2])])
    verdict = match(tree, torch.tensor([[1, 9, 2, 7]]))
    assert verdict.path.tolist() == [[0, 2, 3]] and verdict.token.tolist() == [7] and verdict.accepted.tolist() == [2]


def test_typical_accepts_what_is_likely_enough():
    tree = DraftTree.of_rows([([0, 1, 2, 3], [-1, 0, 0, 2])])
    p = torch.tensor([[[0.0, 0.5, 0.45, 0.05], [0.25] * 4, [0.97, 0.01, 0.01, 0.01], [0.25] * 4]])
    chosen = torch.tensor([[1, 0, 0, 0]])
    verdict = typical(tree, p, chosen)
    assert verdict.path[0, :2].tolist() == [0, 1]  # both siblings pass, the likelier leads; 0.01 is too little to go on
    assert typical(tree, p, chosen, most=0.005).path.tolist() == [[0, 2, 3]]
