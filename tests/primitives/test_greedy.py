"""The greedy choice as methods call it: rows, quotas, padding, seeds; and the first pick of DivPrune."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError, kernels
from laconic.kernels import cpu_greedy, reference_greedy
from laconic.primitives.greedy import (
    CoverageRule,
    DeterminantRule,
    DistanceRule,
    MaxRule,
    SumRule,
    greedy,
    greedy_order,
    most_isolated,
)

WEIGHTS = torch.rand(4, 30, generator=torch.Generator().manual_seed(1))
RULES = [
    MaxRule(), MaxRule(weight=WEIGHTS), MaxRule(offset=0.5 * WEIGHTS, weight=0.5), MaxRule(offset=0.0), SumRule(),
    SumRule(offset=WEIGHTS), DistanceRule(), CoverageRule(), CoverageRule(weight=WEIGHTS), DeterminantRule(weight=WEIGHTS),
]  # fmt: skip
ids = [f"{type(rule).__name__}{number}" for number, rule in enumerate(RULES)]


def of_row(rule, b, slots):
    """The rule for some slots of one row."""
    values = {name: getattr(rule, name) for name in ("weight", "offset") if hasattr(rule, name)}
    return type(rule)(**{name: v[b : b + 1, slots] if isinstance(v, torch.Tensor) else v for name, v in values.items()})


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_rows_are_independent_and_padding_does_not_count(rule):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(4, 30, 20, generator=g)
    valid = torch.rand(4, 30, generator=g) < 0.7
    valid[2], valid[3] = True, torch.arange(30) < 3
    features = features.masked_fill(~valid[..., None], float("nan"))
    quota = torch.tensor([5, 0, 9, 6])
    order = greedy_order(features, quota, rule, valid=valid)
    slots = greedy(features, quota, rule, valid=valid)
    assert order.shape == slots.shape == (4, 9) and order.dtype == slots.dtype == torch.int64
    for b, count in enumerate([5, 0, 9, 3]):
        present = valid[b].nonzero()[:, 0]
        alone = greedy_order(features[b, present][None], quota[b : b + 1], of_row(rule, b, present))
        picks = present[alone[0]].tolist()
        assert len(picks) == count
        assert order[b].tolist() == picks + [-1] * (9 - count)
        assert slots[b].tolist() == [-1] * (9 - count) + sorted(picks)
    assert torch.equal(slots, greedy(features, quota, rule, valid=valid))


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_budgets_are_exact_nested_and_all_are_taken_where_there_are_no_more(rule):
    features = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(3))
    seed = torch.tensor([3, 0, 29, 8])
    every = greedy_order(features, torch.full((4,), 1000), rule, seed=seed)
    assert torch.equal(every.sort().values, torch.arange(30).expand(4, -1))
    assert torch.equal(every[:, 0], seed)
    for k in (0, 1, 2, 7, 29):
        assert torch.equal(greedy_order(features, torch.full((4,), k), rule, seed=seed), every[:, :k])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 25), st.integers(1, 25))
def test_divprune_equals_its_formulas(seed, n, k):
    features = torch.randn(1, n, 16, generator=torch.Generator().manual_seed(seed))
    units = torch.nn.functional.normalize(features[0].double(), dim=-1)
    distance = 1 - units @ units.T
    nearest = distance.clone().fill_diagonal_(9).amin(1)
    found = most_isolated(features)
    assert float(nearest[found]) == pytest.approx(float(nearest.max()), abs=1e-5)
    picks = [int(found)]
    while len(picks) < min(k, n):
        gain = distance[picks].amin(0)
        gain[picks] = -9
        picks.append(int(gain.argmax()))
    assert greedy_order(features, torch.tensor([k]), MaxRule(), seed=found)[0].tolist() == picks


def test_turning_and_scaling_leave_the_choice_alone():
    g = torch.Generator().manual_seed(5)
    features = torch.randn(1, 60, 12, generator=g)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=g)).Q
    other = features @ turn * (0.1 + torch.rand(1, 60, 1, generator=g))
    for rule in (MaxRule(), SumRule(), DeterminantRule()):
        found = [greedy_order(x, torch.tensor([15]), rule, seed=most_isolated(x)) for x in (features, other)]
        assert torch.equal(*found)


def test_the_weights_of_relevance_and_of_diversity():
    features = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(7))
    importance = torch.rand(2, 40, generator=torch.Generator().manual_seed(8))
    quota, best = torch.tensor([9, 9]), importance.argmax(1)
    relevant = greedy(features, quota, MaxRule(offset=importance, weight=0.0), seed=best)
    assert torch.equal(relevant, importance.topk(9).indices.sort().values)
    different = greedy(features, quota, MaxRule(offset=0.0 * importance), seed=best)
    assert torch.equal(different, greedy(features, quota, MaxRule(), seed=best))
    units = torch.nn.functional.normalize(features, dim=-1)
    assert torch.equal(different, greedy(units, quota, DistanceRule(), seed=best)), "|u - v|^2 / 2 = 1 - cos"


def test_a_duplicate_waits_until_nothing_new_is_left():
    features = torch.eye(5)[[0, 0, 1, 2, 2, 3]][None]
    for rule in (MaxRule(), SumRule(), DistanceRule(), CoverageRule(), DeterminantRule()):
        assert greedy_order(features, torch.tensor([6]), rule, seed=torch.tensor([0]))[0].tolist() == [0, 2, 3, 5, 1, 4]


def test_coverage_is_as_good_as_greedy_choices_must_be():
    """Within 1 - 1/e of the best set, and gains never grow."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        covers = torch.rand(1, 11, 6, generator=g) ** 3
        order = greedy_order(covers, torch.tensor([3]), CoverageRule())[0]
        value = [float(covers[0, order[:k]].amax(0).sum()) for k in (1, 2, 3)]
        steps = [value[0], value[1] - value[0], value[2] - value[1]]
        assert steps == sorted(steps, reverse=True)
        best = max(float(covers[0, list(s)].amax(0).sum()) for s in torch.combinations(torch.arange(11), 3).tolist())
        assert value[2] >= 0.632 * best


SEARCHES = pytest.mark.parametrize("module, size", [(cpu_greedy, "_CHUNK"), (reference_greedy, "BLOCK")])


@SEARCHES
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.integers(1, 40), st.booleans())
def test_most_isolated_equals_brute_force_in_parts(module, size, seed, n, part, clustered):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, n, 18, generator=g)
    if clustered:
        features = features[:, torch.randint(0, max(1, n // 4), (n,), generator=g)] + 0.01 * features
    valid = torch.rand(2, n, generator=g) < 0.8
    valid[1] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "most_isolated", module.most_isolated)
        patch.setattr(module, size, part)
        found = most_isolated(features.masked_fill(~valid[..., None], float("nan")), valid)
    assert found[1] == -1
    units = torch.nn.functional.normalize(features[0].double(), dim=-1)
    nearest = (units @ units.T).fill_diagonal_(-9).masked_fill(~valid[0], -9).amax(1).masked_fill(~valid[0], 9)
    expected = (nearest <= nearest.min() + 1e-6).nonzero()[0] if valid[0].any() else torch.tensor([-1])
    assert int(found[0]) == int(expected) or float(nearest[found[0]]) == pytest.approx(float(nearest.min()), abs=3e-6)


@SEARCHES
def test_two_that_are_nearest_to_each_other_tie_to_the_lower(module, size):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(700, 300, generator=g) + 3
    features[650], features[20] = torch.randn(2, 300, generator=g)
    assert module.most_isolated(reference_greedy.unit(features)) == 20


def test_what_cannot_be_is_refused():
    features, quota = torch.rand(2, 5, 4), torch.tensor([2, 2])
    valid = torch.tensor([[True] * 5, [False] + [True] * 4])
    for seed in ([0, 0], [5, 1], [-1, 1]):
        with pytest.raises(LaconicError, match="seed is not among the valid"):
            greedy(features, quota, MaxRule(), seed=torch.tensor(seed), valid=valid)
    with pytest.raises(LaconicError, match="MaxRule: weights must be numbers of at least 0"):
        greedy(features, quota, MaxRule(weight=-1.0))
    with pytest.raises(LaconicError, match="CoverageRule: weights"):
        greedy(features, quota, CoverageRule(weight=torch.full((2, 5), float("nan"))))
    with pytest.raises(LaconicError, match="not finite"):
        greedy(features / 0, quota, MaxRule())


def test_no_gradient_and_rows_without_anything():
    features = torch.rand(2, 5, 4, requires_grad=True)
    seed, valid = torch.tensor([-1, -1]), torch.zeros(2, 5, dtype=torch.bool)
    assert greedy(features, torch.tensor([3, 3]), SumRule(), seed=seed, valid=valid).shape == (2, 0)
    assert not greedy(features, torch.tensor([3, 3]), MaxRule(weight=features.mean(-1))).requires_grad
