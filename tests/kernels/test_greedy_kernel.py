"""The lazy greedy kernel against the eager one in plain torch, and that one against its definition in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import kernels
from laconic.errors import LaconicError
from laconic.kernels import cpu, reference
from laconic.kernels.reference_greedy import RULES

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 3, 16, 33]))


def case(seed, size, dtype=torch.float32, whole=False):
    """Arguments after the rule; with ``whole`` every product is exact in any order, and there are many ties."""
    batch, n, dim = size
    g = torch.Generator().manual_seed(seed)
    if whole:
        rows = torch.zeros(batch, n, dim).scatter_(2, torch.randint(0, dim, (batch, n, 1), generator=g), 2.0)
        weight, offset = (torch.randint(0, 3, (batch, n), generator=g).float() for _ in range(2))
    else:
        rows = torch.randn(batch, n, dim, generator=g).to(dtype)
        weight, offset = torch.rand(batch, n, generator=g), torch.randn(batch, n, generator=g)
    usable = torch.rand(batch, n, generator=g) < 0.8
    usable[:, int(torch.randint(0, n, (), generator=g))] = True
    seeds = usable.float().multinomial(1, generator=g)[:, 0]
    seeds = torch.where(torch.rand(batch, generator=g) < 0.5, seeds, -1)
    counts = (torch.rand(batch, generator=g) * (usable.sum(-1) + 1)).long()
    return rows, weight, offset, usable, seeds, counts


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(RULES), SIZES, st.integers(0, 10**6))
def test_lazy_and_eager_pick_the_same_among_ties(rule, size, seed):
    arguments = case(seed, size, whole=True)
    assert torch.equal(cpu.greedy(rule, *arguments), reference.greedy(rule, *arguments))


def gains(rule, rows, weight, offset, picked):
    """Of all tokens of one row (n, d) in double precision, by the definition."""
    rows, weight, offset = rows.double(), weight.double(), offset.double()
    units = rows / rows.norm(dim=-1, keepdim=True)
    if rule == "coverage":
        cover = rows[picked].amax(0).clamp(min=0) if picked else torch.zeros(rows.shape[1])
        return weight * (rows - cover).clamp(min=0).sum(-1)
    if rule == "determinant":
        kernel = (units @ units.T) * weight * weight[:, None]
        before = float(torch.linalg.det(kernel[picked][:, picked])) if picked else 1.0
        after = [float(torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]])) for i in range(len(rows))]
        return torch.tensor(after, dtype=torch.float64) / before
    if not picked:
        return offset
    if rule == "distance":
        return offset + weight * (rows[:, None] - rows[picked]).square().sum(-1).amin(1)
    cosines = units @ units[picked].T
    return offset - weight * (cosines.sum(1) if rule == "sum" else cosines.amax(1))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@settings(max_examples=120, deadline=None)
@given(st.sampled_from(RULES), SIZES, st.sampled_from(list(cpu.DTYPES)), st.integers(0, 10**6))
def test_every_pick_has_the_largest_gain(name, rule, size, dtype, seed):
    rows, weight, offset, usable, seeds, counts = case(seed, size, dtype)
    if rule == "determinant":  # beyond rank the determinants are 0, and far into it rounding decides
        counts, weight = counts.clamp(max=min(4, size[2])), weight + 0.5
    module = {"cpu": cpu, "reference": reference}[name]
    order = module.greedy(rule, rows, weight, offset, usable, seeds, counts)
    assert order.shape == (size[0], int(counts.max()))
    for b, count in enumerate(counts.tolist()):
        picks = order[b].tolist()
        assert picks[count:] == [-1] * (len(picks) - count)
        picks = picks[:count]
        assert len(set(picks)) == count and bool(usable[b, picks].all())
        for t, pick in enumerate(picks):
            if t == 0 and seeds[b] >= 0:
                assert pick == seeds[b]
                continue
            gain = gains(rule, rows[b], weight[b], offset[b], picks[:t])
            free = usable[b].clone()
            free[picks[:t]] = False
            best = float(gain[free].max())
            assert float(gain[pick]) >= best - 1e-4 * max(1.0, abs(best))


@pytest.mark.parametrize("rule", RULES)
def test_views_and_threads_give_the_same(rule):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 700, 80, generator=g)
    rows = wide[:, ::2, 8:72]
    weight, offset = torch.rand(3, 350, generator=g), torch.rand(3, 350, generator=g)
    rest = {
        "weight": weight, "offset": offset, "usable": torch.ones(3, 350, dtype=torch.bool),
        "seeds": torch.tensor([-1, 4, -1]), "counts": torch.tensor([60, 1, 33]),
    }  # fmt: skip
    found = kernels.greedy(rule, rows, **rest)
    assert torch.equal(found, kernels.greedy(rule, rows.contiguous(), **rest))
    assert torch.equal(found, reference.greedy(rule, rows, *rest.values()))


@pytest.mark.parametrize("rule", RULES)
def test_a_transposed_matrix_is_no_reason_for_the_slow_way(rule, monkeypatch):
    g = torch.Generator().manual_seed(1)
    matrix = torch.rand(2, 20, 30, generator=g)
    rest = {
        "weight": torch.rand(2, 30, generator=g), "offset": torch.rand(2, 30, generator=g),
        "usable": torch.ones(2, 30, dtype=torch.bool), "seeds": torch.tensor([-1, 3]), "counts": torch.tensor([9, 5]),
    }  # fmt: skip
    expected = reference.greedy(rule, matrix.mT, *rest.values())
    monkeypatch.setattr(reference, "greedy", None)
    assert torch.equal(kernels.greedy(rule, matrix.mT, **rest), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_refused_where_they_count(rule, bad):
    rows = torch.rand(1, 5, 4)
    rows[0, 2, 1] = bad
    usable = torch.tensor([[True, True, False, True, True]])
    rest = {"weight": torch.ones(1, 5), "offset": torch.ones(1, 5), "seeds": torch.tensor([-1]), "counts": torch.tensor([4])}
    assert sorted(kernels.greedy(rule, rows, usable=usable, **rest)[0].tolist()) == [0, 1, 3, 4]
    with pytest.raises(LaconicError, match="not finite"):
        kernels.greedy(rule, rows, usable=~usable | usable, **rest)


def test_the_determinant_beyond_the_rank_takes_the_lowest():
    rows = torch.eye(3)[[0, 0, 1, 1, 2, 2]][None]
    rest = (torch.ones(1, 6), torch.zeros(1, 6), torch.ones(1, 6, dtype=torch.bool), torch.tensor([-1]), torch.tensor([6]))
    for module in (cpu, reference):
        assert module.greedy("determinant", rows, *rest)[0].tolist() == [0, 2, 4, 1, 3, 5]
