"""Methods between the encoder and the language model, against their definitions on made-up pictures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import clusters, in_parts, picture

import laconic
from laconic.vision.flashvlm import FlashVLM
from laconic.vision.globalcom2 import GlobalCom2
from laconic.vision.hiprune import neighbours
from laconic.vision.hired import HiRED
from laconic.vision.holov import variety_of
from laconic.vision.mmtok import coverage
from laconic.vision.picture import grid
from laconic.vision.regions import whole_cells_of_parts
from laconic.vision.select import spread_out
from laconic.vision.token_corr import density
from laconic.vision.zoo_prune import ZOOPrune


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def top(scores: torch.Tensor, k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


def test_vtc_cls_sums_blocks_and_leaves_out_the_last() -> None:
    rows = {f"cls_m{i}": rand(1, 36, seed=i) for i in range(1, 8)}
    made = picture(randn(36, 4), **rows)
    summed = sum(rows[f"cls_m{i}"] for i in range(2, 8))[0]
    assert laconic.get("vtc_cls").choose(made, 9).tolist() == top(summed, 9)
    assert laconic.get("vtc_cls", first=-2).choose(made, 9).tolist() == top(rows["cls_m2"][0], 9)
    louder = picture(randn(36, 4), **{name: 3 * row for name, row in rows.items()})
    assert laconic.get("vtc_cls").choose(louder, 9).tolist() == top(summed, 9)


def test_hiprune_keeps_anchors_with_their_neighbours_and_fills_up() -> None:
    middle, deep = rand(1, 64, seed=1), rand(1, 64, seed=2)
    made = picture(randn(64, 4), received_2=middle, received_m2=deep)  # block 2 of 8 is three eighths deep
    kept = laconic.get("hiprune", anchors=0.5).choose(made, 30).tolist()
    anchors = top(middle[0], 3)
    cross = {a + d for a in anchors for d in (-8, 8) if 0 <= a + d < 64}
    cross |= {a + d for a in anchors for d in (-1, 1) if (a + d) // 8 == a // 8}
    fixed = cross | set(anchors)
    assert fixed <= set(kept) and len(kept) == 30
    rest = deep[0].clone()
    rest[list(fixed)] = -1
    assert set(kept) - fixed == set(top(rest, 30 - len(fixed)))
    assert laconic.get("hiprune", anchors=0.0).choose(made, 30).tolist() == top(deep[0], 30)
    assert laconic.get("hiprune").choose(made, 25).tolist() == top(deep[0], 25)  # 2.5 / 5 rounds to no anchor


def test_neighbours_do_not_wrap_around_the_edges() -> None:
    layout, marked = grid(3, 4), torch.zeros(12, dtype=torch.bool)
    marked[[3, 4]] = True  # the end of the first row and the beginning of the second
    assert neighbours(layout, marked).nonzero()[:, 0].tolist() == [0, 2, 5, 7, 8]


def test_regions_of_the_parts_are_quarters_of_the_whole() -> None:
    region = whole_cells_of_parts(in_parts(2, 2, 4)).view(4, 4)
    assert region.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert whole_cells_of_parts(in_parts(1, 2, 4)).view(4, 4)[0].tolist() == [1, 1, 2, 2]


def test_hired_gives_the_part_with_the_marks_the_budget() -> None:
    early, late = torch.zeros(5, 16), rand(5, 16)
    early[0, [10, 11, 14, 15]] = 1.0  # the last quarter of the whole picture
    made = picture(randn(80, 4), in_parts(2, 2, 4), cls_0=early, cls_m2=late)
    kept = HiRED(whole=0.75).choose(made, 20)
    counts = torch.bincount(made.layout.crop[kept], minlength=5).tolist()
    assert counts == [15, 0, 0, 0, 5] and kept[:15].tolist() == top(late[0], 15)
    assert (kept[15:] - 64).tolist() == top(late[4], 5)
    full = torch.bincount(made.layout.crop[HiRED(whole=0.75).choose(made, 60)], minlength=5).tolist()
    assert sum(full) == 60 and full[0] == 16 and full[4] == 16 and max(full[1:4]) - min(full[1:4]) <= 1
    single = picture(randn(16, 4), cls_0=early[:1], cls_m2=late[:1])
    assert HiRED().choose(single, 5).tolist() == top(late[0], 5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 79), st.integers(0, 1000), st.floats(0, 1))
def test_budgets_over_parts_are_exact(k: int, seed: int, whole: float) -> None:
    rows = {"cls_0": rand(5, 16, seed=seed), "cls_m2": rand(5, 16, seed=seed + 1), "cls_m1": rand(5, 16)}
    made = picture(randn(80, 4), in_parts(2, 2, 4), **rows)
    for method in (HiRED(whole=whole), GlobalCom2()):
        kept = method.choose(made, k)
        assert len(kept) == k and len(set(kept.tolist())) == k and bool((kept.diff() > 0).all())


def test_globalcom2_lifts_the_part_that_the_whole_looks_at() -> None:
    worth = torch.full((5, 16), 1.0) + 0.01 * rand(5, 16)
    worth[0, [0, 1, 4, 5]] = 9.0  # the first quarter
    made = picture(randn(80, 4), in_parts(2, 2, 4), cls_m1=worth)
    counts = torch.bincount(made.layout.crop[GlobalCom2().choose(made, 20)], minlength=5)
    assert counts[1] > counts[2:].max() and counts.sum() == 20
    even = picture(randn(80, 4), in_parts(2, 2, 4), cls_m1=torch.ones(5, 16))
    assert torch.bincount(even.layout.crop[GlobalCom2().choose(even, 20)], minlength=5).tolist() == [4, 4, 4, 4, 4]
    single = picture(randn(16, 4), cls_m1=rand(1, 16))
    assert GlobalCom2().choose(single, 5).tolist() == top(rand(1, 16)[0], 5)


def test_holov_keeps_something_of_every_rectangle() -> None:
    attention = torch.full((1, 64), 0.01)
    attention[0, :8] = 1.0
    made = picture(randn(64, 6), cls_m2=attention)
    kept = laconic.get("holov", pieces=4, variety=0.0).choose(made, 16)
    assert len(kept) == 16 and set(range(8)) <= set(kept.tolist())
    even = picture(randn(64, 6), cls_m2=torch.ones(1, 64) + 1e-3 * rand(1, 64))
    kept = laconic.get("holov", pieces=4).choose(even, 16)
    assert torch.bincount(kept // 32 * 2 + kept % 8 // 4).tolist() == [4, 4, 4, 4]  # quarters
    one = laconic.get("holov", pieces=1, variety=0).choose(picture(randn(64, 6), cls_m2=rand(1, 64)), 9)
    assert one.tolist() == top(rand(1, 64)[0], 9)
    features, weights = randn(9, 5), rand(9)
    assert float(variety_of(features, weights).mean()) == pytest.approx(float(weights.mean()), rel=1e-4)


def test_token_corr_gives_dense_crops_more() -> None:
    assert density(torch.ones(16, 4), 0.9, 1 / 16) == 0.0
    assert density(torch.eye(16), 0.9, 1 / 16) == 1.0
    keys = torch.zeros(5, 1, 17, 16)
    keys[:, :, :, 0] = 1.0  # blank paper
    keys[3, 0, 1:] = torch.eye(16)  # text
    found = {"cls_2": rand(5, 16, seed=1), "cls_m2": rand(5, 16, seed=2), "keys_m2": keys}
    made = picture(randn(80, 4), in_parts(2, 2, 4), **found)
    counts = torch.bincount(made.layout.crop[laconic.get("token_corr").choose(made, 10)], minlength=5).tolist()
    assert counts == [0, 0, 0, 10, 0]


def test_divprune_finds_every_cluster_and_random_does_not() -> None:
    sizes = [80, 50, 36, 26, 18, 13, 10, 8, 6, 4, 3, 2]
    hit, by_chance = [], []
    for seed in range(5):
        features, member = clusters(sizes, seed=seed)
        made = picture(features)
        hit.append(len(member[laconic.get("divprune").choose(made, 12)].unique()))
        by_chance.append(len(member[laconic.get("random_prune", seed=seed).choose(made, 12)].unique()))
    assert hit == [12] * 5 and sum(by_chance) / 5 < 9


def test_todre_begins_with_the_most_salient_and_keeps_apart() -> None:
    features, member = clusters([60, 25, 10, 5])
    attention = torch.zeros(1, 100)
    attention[0, 17] = 1.0
    made = picture(features, cls_m1=attention)
    for variant in ("sum", "kcenter"):
        kept = laconic.get("todre", variant=variant).choose(made, 4)
        assert 17 in kept.tolist() and len(member[kept].unique()) >= 3


def test_zoo_sensitivity_is_the_length_of_the_jacobian_along_random_directions() -> None:
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.GELU(), torch.nn.Linear(12, 5)).double()
    given = randn(1, 9, 6).double()
    with torch.no_grad():
        made = picture(projector(given)[0], encoded=given, projector=projector)
    method = ZOOPrune(directions=3)
    generator = torch.Generator().manual_seed(0)
    nudges = [torch.nn.functional.normalize(torch.randn(6, generator=generator), dim=0).double() for _ in range(3)]
    jacobians = [torch.autograd.functional.jacobian(projector, x) for x in given[0]]
    exact = torch.stack([torch.stack([(j @ u).norm() for u in nudges]).mean() for j in jacobians]).float()
    torch.testing.assert_close(method.sensitivity(made), exact, atol=1e-3, rtol=1e-3)
    nearly = torch.full((5,), 2.0) + 1e-6 * rand(5)
    assert torch.equal(spread_out(nearly, torch.arange(5)), torch.ones(5))  # a linear projector reacts to all alike


def test_idpruner_at_its_ends() -> None:
    attention = rand(1, 49)
    made = picture(randn(49, 8), cls_m2=attention)
    assert laconic.get("idpruner", share=1.0).choose(made, 10).tolist() == top(attention[0], 10)
    assert int(attention.argmax()) in laconic.get("idpruner", share=0.0).choose(made, 10).tolist()
    wider = picture(randn(49, 8), cls_m2=3 * attention + 7)
    assert torch.equal(laconic.get("idpruner").choose(made, 10), laconic.get("idpruner").choose(wider, 10))
    with pytest.raises(laconic.LaconicError, match="score_by"):
        laconic.get("idpruner", score_by="luck")


def test_mmtok_keeps_what_the_question_is_about() -> None:
    features, member = clusters([70, 20, 8, 2], dim=12)
    asked = features[member == 3].mean(0, keepdim=True)
    made = picture(features, text=asked)
    assert 3 in member[laconic.get("mmtok").choose(made, 4)].tolist()
    matrix = coverage(asked, features, torch.ones(100, dtype=torch.bool), 0.02)
    assert float(matrix.sum()) == pytest.approx(1.0, abs=1e-4)


def test_flashvlm_without_text_ranks_by_salience_and_with_it_by_both() -> None:
    attention = rand(1, 64)
    features, member = clusters([50, 10, 4], dim=8)
    asked = features[member == 2].mean(0, keepdim=True)
    made = picture(features, text=asked, cls_m2=attention)
    blind = FlashVLM(text=0.0, important=1.0).choose(made, 10)
    assert blind.tolist() == top(attention[0], 10)
    assert set((member == 2).nonzero()[:, 0].tolist()) <= set(FlashVLM(text=1.0, important=1.0).choose(made, 6).tolist())
    assert all(len(FlashVLM().choose(made, k)) == k for k in range(1, 50))


def test_tome_keeps_the_mean_of_everything() -> None:
    features, member = clusters([30, 20, 14], dim=8)
    reduction = laconic.get("tome").reduce(picture(features), 16)
    sizes = torch.bincount(reduction.into, minlength=64)[reduction.kept].float()
    torch.testing.assert_close((reduction.features * sizes[:, None]).sum(0), features.sum(0), atol=1e-3, rtol=1e-3)
    assert all(len(member[reduction.into == kept].unique()) == 1 for kept in reduction.kept.tolist())


def test_visionzip_merges_what_is_not_salient() -> None:
    attention, keys = rand(1, 64), randn(1, 2, 65, 4)
    made = picture(randn(64, 6), cls_m2=attention, keys_m2=keys)
    reduction = laconic.get("visionzip", contextual=0.25).reduce(made, 16)
    salient = set(top(attention[0], 12))
    assert salient <= set(reduction.kept.tolist()) and len(reduction.kept) == 16 and bool((reduction.into >= 0).all())
    for position, token in enumerate(reduction.kept.tolist()):
        joined = [i for i in range(64) if int(reduction.into[i]) == token and i != token]
        expected = made.features[token]
        if token not in salient and joined:
            expected = (expected + made.features[joined].mean(0)) / 2
        torch.testing.assert_close(reduction.features[position], expected, atol=1e-5, rtol=1e-5)
    plain = laconic.get("visionzip", contextual=0.0).reduce(made, 16)
    assert plain.kept.tolist() == top(attention[0], 16)


def test_dart_takes_what_is_least_like_its_pivots() -> None:
    features = randn(36, 5)
    made = picture(features)
    pivots = top(-features.abs().sum(-1), 2)
    unit = features / features.norm(dim=-1, keepdim=True)
    kept = list(pivots)
    for turn in range(6):
        rest = [i for i in range(36) if i not in kept]
        kept.append(min(rest, key=lambda i: (float(unit[pivots[turn % 2]] @ unit[i]), i)))
    assert laconic.get("dart", pivots=2).choose(made, 8).tolist() == sorted(kept)


def test_random_sets_are_uniform_and_of_the_seed() -> None:
    made = picture(randn(16, 2))
    counts = torch.zeros(16)
    for seed in range(800):
        counts[laconic.get("random_prune", seed=seed).choose(made, 4)] += 1
    assert float(((counts - 200) ** 2 / 200).sum()) < 37.7  # chi-square with 15 degrees of freedom, 0.1 %
    assert torch.equal(laconic.get("random_prune").choose(made, 4), laconic.get("random_prune").choose(made, 4))


def test_uniform_distances_differ_by_one_at_most() -> None:
    for k in range(1, 36):
        kept = laconic.get("uniform").choose(picture(randn(36, 2)), k)
        gaps = kept.diff()
        assert len(kept) == k and (k < 3 or int(gaps.max() - gaps.min()) <= 1)
