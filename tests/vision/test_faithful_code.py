"""Where released code and paper differ: the default is the definition, and ``faithful_code`` what the code does."""

from __future__ import annotations

import pytest
import torch
import vlm
from made import clusters, in_parts, picture
from test_before import rand, randn, top
from test_inside import held, maps, pictured
from test_merging_inside import second_layer, stock

import laconic
from laconic import registry
from laconic.vision.corematching import overlap_with_one
from laconic.vision.flowcut import FlowCut
from laconic.vision.globalcom2 import GlobalCom2
from laconic.vision.hiprune import HiPrune, neighbours, wrapped
from laconic.vision.hired import HiRED
from laconic.vision.picture import Layout, grid
from laconic.vision.recoverable_compression import RecoverableCompression, likeness, outliers
from laconic.vision.regions import even_cells_of_parts, tiles, whole_cells_of_parts
from laconic.vision.schedule import falling
from laconic.vision.sheets import Stack
from laconic.vision.thinning import Flow, Thinning
from laconic.vision.transprune import transition

WITH = [row["id"] for row in laconic.methods() if any(p["name"] == "faithful_code" for p in row["parameters"])]


def test_which_methods_have_it_and_none_by_default() -> None:
    assert WITH == [
        "attention_debias", "corematching", "flashvlm", "flowcut", "globalcom2", "hiprune", "hired", "holov",
        "recoverable_compression", "transprune", "visiondrop", "visionzip",
    ]  # fmt: skip
    for name in WITH:
        assert registry.get(name).faithful_code is False and "``faithful_code``" in registry.find(name).__doc__


# --- before the language model ---------------------------------------------------------------------------------------
def test_hired_counts_marks_in_raster_stretches_and_loses_what_rounding_leaves() -> None:
    early, late = torch.zeros(5, 16), rand(5, 16)
    early[0, [2, 3, 6, 7]] = 1.0  # the second quarter: half of the first and half of the second stretch of rows
    made = picture(randn(80, 4), in_parts(2, 2, 4), cls_0=early, cls_m2=late)
    assert HiRED(whole=0.75).marks(made).tolist() == [0, 4, 0, 0]
    assert HiRED(whole=0.75, faithful_code=True).marks(made).tolist() == [2, 2, 0, 0]
    counts = torch.bincount(made.layout.crop[HiRED(whole=0.75, faithful_code=True).choose(made, 20)], minlength=5)
    assert counts.tolist() == [15, 2, 2, 0, 0]  # five for two parts: one is lost
    single = picture(randn(16, 4), cls_0=early[:1], cls_m2=late[:1])
    assert torch.equal(HiRED().choose(single, 5), HiRED(faithful_code=True).choose(single, 5))


def cut_off(layout: Layout, column: int) -> Layout:
    """Without the columns from ``column`` on in the parts at the right edge, as padding is cut off."""
    gone = (layout.crop > 0) & ((layout.crop - 1) % layout.parts[1] == layout.parts[1] - 1) & (layout.column >= column)
    return Layout(layout.crop[~gone], layout.row[~gone], layout.column[~gone], layout.shapes, layout.parts)


def test_globalcom2_regions_forget_the_padding() -> None:
    layout = cut_off(in_parts(1, 2, 6), 2)  # the second part shows a quarter of the picture
    assert whole_cells_of_parts(layout).view(6, 6)[0].tolist() == [1, 1, 1, 1, 2, 2]
    assert even_cells_of_parts(layout).view(6, 6)[0].tolist() == [1, 1, 1, 2, 2, 2]
    assert even_cells_of_parts(in_parts(2, 2, 5)).view(5, 5)[:, 0].tolist() == [1, 1, 3, 3, 3]  # the last takes the rest
    for parts in ((2, 2), (1, 2)):
        plain = in_parts(*parts, 4)
        assert torch.equal(even_cells_of_parts(plain), whole_cells_of_parts(plain))


def test_globalcom2_takes_logits_and_rounds_down() -> None:
    queries, keys = randn(5, 2, 17, 8, seed=1), 3 * randn(5, 2, 17, 8, seed=2)
    made = picture(randn(80, 4), in_parts(2, 2, 4), queries_m1=queries, keys_m1=keys)
    method, k = GlobalCom2(faithful_code=True), 23
    logits = torch.einsum("chd,chnd->chn", queries[:, :, 0], keys[:, :, 1:]).mean(1) / 8**0.5
    torch.testing.assert_close(method.worth(made), logits.flatten())
    sums = torch.stack([logits[0].view(4, 4)[r : r + 2, c : c + 2].sum() for r in (0, 2) for c in (0, 2)])
    lift = (sums / 10).softmax(0)
    ratios = (k / 80 * (1 + lift - 0.25)).clamp(max=1)
    expected = [int(k / 80 * 16), *[int(16 * r) for r in ratios.tolist()]]
    kept = method.choose(made, k)
    assert torch.bincount(made.layout.crop[kept], minlength=5).tolist() == expected and sum(expected) < k
    assert kept[: expected[0]].tolist() == top(logits[0], expected[0])


def test_holov_cuts_rectangles_and_as_released_stretches() -> None:
    parts = tiles(grid(6, 6), 4)
    assert [part.tolist()[:3] for part in parts] == [[0, 1, 2], [3, 4, 5], [18, 19, 20], [21, 22, 23]]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(36)) and {len(p) for p in parts} == {9}
    crops = tiles(in_parts(2, 2, 4), 20)
    assert len(crops) == 20 and all(len(in_parts(2, 2, 4).crop[part].unique()) == 1 for part in crops)
    attention = torch.full((1, 64), 0.01)
    attention[0, 0], attention[0, 40] = 9.0, 1.0
    made = picture(randn(64, 6), cls_m2=attention)
    kept = laconic.get("holov", pieces=4, faithful_code=True).choose(made, 24)
    # 9.15 : 0.16 : 1.15 : 0.16 of 24: 20 is more than the first stretch has, and what it cannot hold is lost
    counts = torch.bincount(kept // 16, minlength=4).tolist()
    assert counts[0] == 16 and sum(counts) < 24 and len(laconic.get("holov", pieces=4).choose(made, 24)) == 24
    rows = torch.stack([rand(16, seed=7).roll(3 * i) for i in range(4)])  # stretches of equal worth
    even = picture(randn(64, 6, seed=5), cls_m2=rows.view(1, 64))
    kept = laconic.get("holov", pieces=4, faithful_code=True).choose(even, 16).tolist()
    assert kept == [16 * i + j for i in range(4) for j in top(rows[i], 4)]  # by attention, whatever the features are like


def test_hiprune_wraps_around_the_ends_of_rows() -> None:
    layout, marked = grid(3, 4), torch.zeros(12, dtype=torch.bool)
    marked[3] = True  # the end of the first row
    assert neighbours(layout, marked).nonzero()[:, 0].tolist() == [2, 7]
    assert wrapped(layout, marked).nonzero()[:, 0].tolist() == [0, 2, 4, 7]  # 3 - 4 is set to the first
    middle, deep = torch.zeros(1, 64), rand(1, 64, seed=2) / 64
    middle[0, 15] = 1.0
    made = picture(randn(64, 4), received_2=middle, received_m2=deep)
    kept = {faithful: HiPrune(faithful_code=faithful).choose(made, 40) for faithful in (False, True)}
    fixed = {False: {7, 14, 15, 23}, True: {7, 14, 15, 16, 23}}
    for faithful, chosen in kept.items():
        rest = deep[0].clone()
        rest[list(fixed[faithful])] = -1
        assert set(chosen.tolist()) == fixed[faithful] | set(top(rest, 40 - len(fixed[faithful])))
    inner = middle.roll(12, dims=1)  # an anchor with all four neighbours: nothing differs
    made = picture(randn(64, 4), received_2=inner, received_m2=deep)
    assert torch.equal(HiPrune().choose(made, 40), HiPrune(faithful_code=True).choose(made, 40))


def test_hiprune_without_a_class_token_may_count_anchors_twice() -> None:
    middle, deep = torch.zeros(1, 64), rand(1, 64, seed=2)
    middle[0, 27], deep[0, 27], deep[0, 28] = 1.0, 9.0, 5.0
    made = picture(randn(64, 4), received_2=middle, received_m2=deep, has_class=False)
    assert len(HiPrune().choose(made, 40)) == 40
    kept = HiPrune(faithful_code=True).choose(made, 40)
    less = deep[0].clone()
    less[[19, 26, 27, 28, 35]] -= 1
    assert kept.tolist() == sorted({19, 26, 27, 28, 35} | set(top(less, 35))) and len(kept) == 38


def test_flowcut_takes_the_most_of_all_crops() -> None:
    class Fixed(FlowCut):
        def leaving(self, left: int, target: int, blocks: int, attention: torch.Tensor) -> int:
            return int(attention[0] * 10)

    flow = Flow(*(torch.stack([torch.full((16,), 0.2), torch.full((16,), 0.5)]) for _ in range(2)), rand(2, 16))
    for faithful, expected in ((False, [14, 11]), (True, [11, 11])):
        thinning = object.__new__(Thinning)
        thinning.method, thinning.measured, thinning.target = Fixed(faithful_code=faithful), [0, 1, 2, 3, 4], lambda n: 4
        thinning.sheet, thinning.worth, thinning._flows, hidden = Stack(side=1, first=1), None, [flow], torch.zeros(2, 17, 3)
        thinning.sheet.begin(hidden)
        thinning.change(hidden, 1)
        assert thinning.sheet.alive.sum(-1).tolist() == expected


def test_flashvlm_reads_the_whole_prompt() -> None:
    features, member = clusters([50, 10, 4], dim=8)
    words = torch.stack([features[member == 1].mean(0), features[member == 2].mean(0)])
    made = picture(features, text=words, cls_m2=rand(1, 64))
    made.after = torch.tensor([False, True])  # the first word stands in front of the picture
    options = {"text": 1.0, "important": 1.0, "token_temperature": 1.0}
    for faithful, found in ((False, {2}), (True, {1, 2})):
        kept = laconic.get("flashvlm", faithful_code=faithful, **options).choose(made, 4 if faithful is False else 14)
        assert set(member[kept].tolist()) == found
    made.after = torch.tensor([True, True])
    both = [laconic.get("flashvlm", faithful_code=faithful).choose(made, 20) for faithful in (False, True)]
    assert torch.equal(*both)


def test_recoverable_compression_counts_and_looks_up_as_released() -> None:
    salience, asked = (2 * randn(64, seed=1)).exp(), (2 * randn(64, seed=2)).exp()  # many stand out
    seen = max(1, round(64 * outliers(salience, 20)))
    order = salience.argsort(descending=True, stable=True)
    judged = asked.clone()
    judged[order[:seen]] = asked.min()
    wanted = round((64 - seen) * outliers(judged, 20))
    centres = round((seen + wanted) * outliers(salience[order[seen:]], 10))
    assert wanted and centres
    expected = torch.tensor([seen, wanted, centres]).double()
    found, plain = (RecoverableCompression(faithful_code=f).counts(salience, asked, 41) for f in (True, False))
    assert float((found - 40 * expected / expected.sum()).abs().max()) < 1 and not torch.equal(found, plain)
    attention, keys, features, text = rand(1, 64, seed=3), randn(1, 2, 65, 4, seed=4), randn(64, 6, seed=5), randn(3, 6, seed=6)
    attention[0, [5, 9, 20, 30]] = torch.tensor([30.0, 28.0, 3.0, 4.0])
    made = picture(features, text=text, cls_m1=attention, keys_m1=keys)
    plain, faithful = (RecoverableCompression(faithful_code=f, near=4).reduce(made, 16) for f in (False, True))
    assert len(plain.kept) == len(faithful.kept) == 16
    method = RecoverableCompression(faithful_code=True, near=1, text=0)
    into, tokens = torch.full((64,), -1), features.clone()
    method._condense(made, tokens, into, torch.tensor([10]), torch.arange(2, 64), attention[0], likeness(made), False)
    unit = torch.nn.functional.normalize(made.keys(-1), dim=-1)
    places = unit[:62] @ unit[8]  # the token at place i of the rest has the key of token i
    places[8] = -2
    assert (into == 10).nonzero()[:, 0].tolist() == sorted([10, 2 + int(places.argmax())])


def test_visionzip_adds_what_joins() -> None:
    made = picture(randn(64, 6), cls_m2=rand(1, 64), keys_m2=randn(1, 2, 65, 4))
    plain, faithful = (laconic.get("visionzip", contextual=0.25, faithful_code=f).reduce(made, 16) for f in (False, True))
    assert torch.equal(plain.into, faithful.into)
    joined = torch.bincount(plain.into, minlength=64)[plain.kept] > 1
    assert 0 < int(joined.sum()) <= 4
    torch.testing.assert_close(faithful.features, torch.where(joined[:, None], 2 * plain.features, plain.features))


# --- between its layers ----------------------------------------------------------------------------------------------
def test_transprune_a_turn_to_the_opposite() -> None:
    given = torch.eye(4)[None, :3]
    made = torch.stack([-given[0, 0], given[0, 1], torch.eye(4)[3]])[None]  # back, on, and to the side
    at = torch.arange(3)[None]
    torch.testing.assert_close(transition(given, made, at)[0], torch.tensor([0.0, 0.0, 1.0]).softmax(0))
    torch.testing.assert_close(transition(given, made, at, opposite=True)[0], torch.tensor([2.0, 0.0, 1.0]).softmax(0))
    sharp = (given + 0.1 * rand(1, 3, 4)).abs()  # of acute angles both are the same
    torch.testing.assert_close(transition(given, sharp, at), transition(given, sharp, at, opposite=True))


def test_corematching_compares_with_the_fifth_token_from_the_end() -> None:
    z = randn(2, 9, 20, seed=1)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :2] = False
    found = overlap_with_one(z, real)
    for row in range(2):
        for token in range(9):
            shared = sum(a > 0 and b > 0 for a, b in zip(z[row, token].tolist(), z[row, 4].tolist(), strict=True))
            assert found[row, token] == (shared if real[row, token] else 0)


def test_attention_debias_leaves_later_stages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: {"slope": [3.0] * 3, "height": [1.0] * 3})
    x, recipe = vlm.inputs("llava", (1,)), "attention_debias(pyramiddrop(stages=3), padding=false{}):60%"
    image = pictured(x)
    plain, faithful = (held("llava", recipe.format(more), x) for more in ("", ", faithful_code=true"))
    assert plain[1] == faithful[1] and plain[2] != faithful[2]
    once = held("llava", "attention_debias(fastv(layers=1), padding=false):50%", x)
    assert once == held("llava", "attention_debias(fastv(layers=1), padding=false, faithful_code=true):50%", x)
    assert len(set(plain[2]) & set(image)) == len(set(faithful[2]) & set(image))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_visiondrop_adds_what_joins_and_does_not_weigh(family: str) -> None:
    x = vlm.inputs(family, (1,))
    image, known = pictured(x), stock(family, x)
    within = maps(family, x)[0][0]
    plan = falling(laconic.Budget.parse("60%"), len(image), len(maps(family, x)), 4)
    scores = within[image].mean(0)
    few = round(0.3 * plan[0])
    dominant = top(scores[image], plan[0] - few)
    dominant = [image[i] for i in dominant]
    got = second_layer(family, "visiondrop(contextual=0.3, faithful_code=true):60%", x)
    targets = sorted(set(got) & set(image) - set(dominant))
    assert set(dominant) <= set(got) and len(targets) == few
    keys = torch.nn.functional.normalize(known.keys, dim=-1)
    members: dict[int, list[int]] = {t: [] for t in targets}
    for p in sorted(set(image) - set(dominant) - set(targets)):
        members[max(targets, key=lambda t, p=p: float(keys[p] @ keys[t]))].append(p)
    assert any(members.values())
    for p, hidden in got.items():
        expected = known.hidden[p] + (known.hidden[members[p]].mean(0) if members.get(p) else 0)
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
