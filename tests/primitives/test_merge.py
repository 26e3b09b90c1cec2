"""Merges against loops, and what any merge keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError
from laconic.primitives.merge import Merge, assign_and_merge, bipartite_merge, grid_cells, group_merge
from laconic.primitives.select import marked

SEEDS = st.integers(0, 10**6)


def check(merge: Merge, values: torch.Tensor, members: list[dict[int, list[int]]]) -> None:
    """``members``: per row, by slot, the tokens that are merged there."""
    weight = torch.rand(values.shape[:2], generator=torch.Generator().manual_seed(0))
    mean, weighted, sizes = merge(values), merge(values, weight), merge.sizes()
    assert mean.shape == (*merge.slots.shape, values.shape[-1])
    for b, row in enumerate(members):
        slots = sorted(row)
        empty = merge.slots.shape[1] - len(slots)
        assert merge.slots[b].tolist() == [-1] * empty + slots
        assert sizes[b].tolist() == [0.0] * empty + [float(len(row[slot])) for slot in slots]
        assert not bool(mean[b, :empty].any())
        for j, slot in enumerate(slots, start=empty):
            share = weight[b, row[slot], None]
            torch.testing.assert_close(mean[b, j], values[b, row[slot]].mean(0))
            torch.testing.assert_close(weighted[b, j], (values[b, row[slot]] * share).sum(0) / share.sum())


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(1, 25))
def test_the_others_join_their_nearest_kept_token(seed: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(3, n, 8, generator=g), torch.randn(3, n, 5, generator=g)
    valid = torch.rand(3, n, generator=g) < 0.8
    stays = valid & (torch.rand(3, n, generator=g) < 0.4)
    stays[0] = valid[0]
    merge = assign_and_merge(keys.masked_fill(~valid[..., None], float("nan")), marked(stays), valid)
    units = torch.nn.functional.normalize(keys, dim=-1)
    members = []
    for b in range(3):
        kept = stays[b].nonzero()[:, 0].tolist()
        row = {slot: [slot] for slot in kept}
        for i in (valid[b] & ~stays[b]).nonzero()[:, 0].tolist() if kept else []:
            row[kept[int((units[b, kept] @ units[b, i]).argmax())]].append(i)
        members.append(row)
    check(merge, values.masked_fill(~valid[..., None], 3.0), members)


def test_equal_ones_join_the_lowest_and_no_valid_means_all() -> None:
    merge = assign_and_merge(torch.ones(1, 5, 2), torch.tensor([[-1, 1, 3]]))
    assert merge.group.tolist() == [[1, 1, 1, 2, 1]]
    assert merge.sizes().tolist() == [[0.0, 4.0, 1.0]]


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(1, 25), st.integers(0, 14))
def test_bipartite_merging_equals_a_loop(seed: int, n: int, count: int) -> None:
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, n, 8, generator=g), torch.randn(2, n, 5, generator=g)
    valid, fixed = torch.rand(2, n, generator=g) < 0.9, torch.rand(2, n, generator=g) < 0.2
    merge = bipartite_merge(keys, count, fixed=fixed, valid=valid)
    units = torch.nn.functional.normalize(keys, dim=-1)
    members = []
    for b in range(2):
        here = valid[b].nonzero()[:, 0].tolist()
        sources, targets = ([i for i in here[half::2] if not fixed[b, i]] for half in (0, 1))
        edges = []
        for i in sources if targets else []:
            cosines = units[b, targets] @ units[b, i]
            edges.append((-float(cosines.max()), i, targets[int(cosines.argmax())]))
        row = {i: [i] for i in here}
        for _, i, target in sorted(edges)[:count]:
            del row[i]
            row[target].append(i)
        members.append(row)
    check(merge, values, members)


def test_merging_again_counts_all_that_were_merged_before() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(1, 16, 4, generator=g)
    sizes, x = torch.ones(1, 16), values
    for _ in range(4):
        merge = bipartite_merge(x, 4)
        x, sizes = merge(x, sizes), merge.sizes(sizes)
    assert float(sizes.sum()) == 16 and x.shape == (1, sizes.shape[1], 4)
    torch.testing.assert_close((x * sizes[..., None]).sum(1), values.sum(1))


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(1, 25))
def test_groups_stand_at_the_place_of_their_worthiest(seed: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    groups = torch.randint(-2, 5, (2, n), generator=g)
    worth, values = torch.randint(0, 3, (2, n), generator=g).float(), torch.randn(2, n, 5, generator=g)
    for given_worth in (None, worth):
        members = []
        for b in range(2):
            row = {i: [i] for i in range(n) if groups[b, i] == -1}
            for number in range(5):
                own = (groups[b] == number).nonzero()[:, 0].tolist()
                if own:
                    best = own[0] if given_worth is None else min(own, key=lambda i: (-float(worth[b, i]), i))
                    row[best] = own
            members.append(row)
        check(group_merge(groups, given_worth), values, members)


def test_cells_of_a_grid() -> None:
    assert grid_cells(3, 5, 2).view(3, 5).tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    assert grid_cells(4, 4, 1.5).view(4, 4)[:, 0].tolist() == [0, 0, 3, 6]
    assert torch.equal(grid_cells(4, 6, 1), torch.arange(24))
    with pytest.raises(LaconicError, match="at least 1"):
        grid_cells(4, 4, 0.5)
    image = torch.arange(24.0).view(1, 4, 6)
    merge = group_merge(grid_cells(4, 6, 2)[None])
    pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(1)
    assert torch.equal(merge(image.view(1, 24, 1))[..., 0], pooled) and merge.slots[0].tolist() == [0, 2, 4, 12, 14, 16]


def test_a_token_that_is_alone_stays_as_it_is_and_weightless_groups_have_their_plain_mean() -> None:
    values = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    merge = group_merge(torch.tensor([[-1, 0, 0, -1]]))
    weight = torch.tensor([[0.3, 0.0, 0.0, 0.0]])
    found = merge(values, weight)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0, [0, 2]], values[0, [0, 3]])
    torch.testing.assert_close(found[0, 1].float(), values[0, 1:3].float().mean(0), atol=1e-2, rtol=1e-2)


def test_gradients_reach_the_members() -> None:
    values = torch.randn(1, 6, 2, requires_grad=True)
    bipartite_merge(values, 2)(values).sum().backward()
    assert values.grad is not None and bool((values.grad > 0).all())


def test_a_count_below_zero_is_refused() -> None:
    with pytest.raises(LaconicError, match="-1 tokens cannot be merged"):
        bipartite_merge(torch.ones(1, 4, 2), -1)
