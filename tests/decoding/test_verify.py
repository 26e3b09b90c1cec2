"""Verifiers: golden numbers, and tokens that follow the law of the model whatever is drafted."""

from __future__ import annotations

import pytest
import torch

from laconic.decoding.tree import DraftTree, TreeShape
from laconic.decoding.verify import division_factor, draw, k_seq, match, rejection, typical

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


def without_replacement(rows: torch.Tensor, count: int, generator) -> torch.Tensor:
    noise = torch.empty_like(rows).exponential_(generator=generator)
    return (rows / noise).topk(count, dim=-1).indices


@pytest.mark.parametrize(("count", "accepted"), [(1, 0.6), (2, 0.764), (4, 1.0)])
def test_rejection_without_replacement_of_the_golden_pair(count, accepted):
    tokens = torch.cat([torch.zeros(ROWS, 1, dtype=torch.int64), without_replacement(Q.expand(ROWS, 4), count, dice())], dim=1)
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
            tokens[:, children] = without_replacement(laws[:, node], len(children), generator)
    return DraftTree(tokens, shape, laws)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_the_first_two_tokens_follow_the_model(name, verifier):
    p, q = markov(1), markov(2)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    tree = drawn_tree(SHAPES[name], q, dice(3))
    laws = p[tree.tokens]
    generator = dice(4)
    verdict = match(tree, draw(laws, generator)) if verifier == "match" else rejection(tree, laws, generator)
    counts = torch.zeros(3, 3)
    took = verdict.accepted
    second = torch.where(took > 0, tree.tokens.gather(1, verdict.path[:, 1:2].clamp(min=0))[:, 0], verdict.token)
    # what stands second where only one token came out is drawn by the next forward: from the model's law
    drawn = draw(p[second], generator)
    third = torch.where(took > 0, verdict.token, drawn)
    if verdict.path.shape[1] > 2:
        third = torch.where(took > 1, tree.tokens.gather(1, verdict.path[:, 2:3].clamp(min=0))[:, 0], third)
    counts.view(-1).scatter_add_(0, second * 3 + third, torch.ones(ROWS))
    assert fits(counts.view(-1), (p[0][:, None] * p).view(-1))


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
