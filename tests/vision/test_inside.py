"""Methods between layers of the language model, against what the stock model's attention maps say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vlm
from hypothesis import given, settings
from hypothesis import strategies as st

import laconic
from laconic.budget import Budget
from laconic.primitives.merge import Merge
from laconic.vision.adatoken3d import nucleus
from laconic.vision.corematching import overlap
from laconic.vision.inside import Entries, take_in
from laconic.vision.schedule import falling, stepwise, thinned
from laconic.vision.transprune import transition


def maps(family: str, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The stock model's attention per layer, mean over heads, ``(batch, n, n)``."""
    return [layer.mean(1) for layer in vlm.maps(family, x)]


def held(family: str, recipe: str, x: dict[str, torch.Tensor]) -> list[list[int]]:
    """Positions in each layer's cache after the prompt of one row."""
    with laconic.apply(vlm.build(family), recipe) as handle, torch.no_grad():
        vlm.build(family)(**x)
        return [[p for p in layer.positions[0, 0].tolist() if p >= 0] for layer in handle.latest.layers]


def pictured(x: dict[str, torch.Tensor]) -> list[int]:
    return (x["input_ids"][0] == vlm.IMAGE).nonzero()[:, 0].tolist()


def top(scores: torch.Tensor, k: int, among: list[int]) -> list[int]:
    return sorted(sorted(among, key=lambda i: (-round(float(scores[i]), 7), i))[:k])


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "qwen2_vl"])
def test_fastv_keeps_what_the_last_token_looks_at(family: str) -> None:
    x = vlm.inputs(family, (1,))
    image = pictured(x)
    layers = held(family, "fastv(layers=1):20%", x)
    k = Budget.parse("20%").tokens(len(image))
    expected = top(maps(family, x)[0][0, -1], k, image)
    assert layers[0] == list(range(x["input_ids"].shape[1]))
    for positions in layers[1:]:
        assert [p for p in positions if p in image] == expected
        assert [p for p in positions if p not in image] == [p for p in layers[0] if p not in image]


def test_mustdrop_goes_by_the_words_behind_the_picture() -> None:
    x = vlm.inputs("llava", (1,))
    image = pictured(x)
    first = maps("llava", x)[0][0]
    words = first[image[-1] + 1 :]
    plan = falling(Budget.parse("50%"), len(image), 3, 4)
    ratio = torch.maximum(words.sum(0) / 0.001, words.amax(0) / 0.001)
    layers = held("llava", "mustdrop(key_share=0, cut=false):50%", x)
    assert [p for p in layers[1] if p in image] == top(ratio, plan[0], image)


def test_mustdrop_never_drops_key_tokens_and_cuts_the_layers_between() -> None:
    x = vlm.inputs("llava", (1,))
    image = pictured(x)
    with laconic.apply(vlm.build("llava"), "mustdrop(key_share=0.1):50%") as handle, torch.no_grad():
        vlm.build("llava")(**x)
        salience = handle.entry.pictures[0].salience(-1)
        layers = [[p for p in layer.positions[0, 0].tolist() if p in image] for layer in handle.latest.layers]
    keys = {image[i] for i in salience.argsort(descending=True, stable=True)[:7].tolist()}
    assert keys <= set(layers[-1])
    assert len(layers[0]) == 64 and layers[1] == layers[2]  # the second layer has forgotten what the last drop took


def test_visiondrop_weighs_rows_and_columns() -> None:
    x = vlm.inputs("llava", (1,))
    image = pictured(x)
    within = maps("llava", x)[0][0][image][:, image]
    plan = falling(Budget.parse("50%"), len(image), 3, 4)
    scores = torch.zeros(x["input_ids"].shape[1])
    rows = within / within.sum(-1, keepdim=True) * torch.arange(1, len(image) + 1)[:, None]
    scores[image] = rows.sum(0) / torch.arange(len(image), 0, -1)
    layers = held("llava", "visiondrop(contextual=0):50%", x)
    assert [p for p in layers[1] if p in image] == top(scores, plan[0], image)
    scores[image] = within.sum(0)
    layers = held("llava", "visiondrop(contextual=0, faithful_code=true):50%", x)
    assert [p for p in layers[1] if p in image] == top(scores, plan[0], image)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_visiondrop_where_the_tokens_of_a_picture_see_each_other(family: str) -> None:
    x = vlm.inputs(family, (1,))
    image = pictured(x)
    within = maps(family, x)[0][0][image][:, image]
    scores = torch.zeros(x["input_ids"].shape[1])
    scores[image] = (within / within.sum(-1, keepdim=True) * len(image)).sum(0) / len(image)  # every one sees every one
    layers = held(family, "visiondrop(contextual=0):50%", x)
    plan = falling(Budget.parse("50%"), len(image), len(layers), 4)
    assert [p for p in layers[1] if p in image] == top(scores, plan[0], image)


def test_visiondrop_keeps_the_same_for_every_question() -> None:
    kept = []
    for question in range(3):
        x = vlm.inputs("llava", (1,))
        image = pictured(x)
        x["input_ids"][0, image[-1] + 1 :] = torch.randint(5, 80, (x["input_ids"].shape[1] - image[-1] - 1,))
        layers = held("llava", "visiondrop:40%", x)
        kept.append([[p for p in layer if p in image] for layer in layers])
        assert question >= 0
    assert kept[0] == kept[1] == kept[2]


def test_withdraw_leaves_when_nobody_looks_and_only_then() -> None:
    x = vlm.inputs("llava", (1,))
    image, n = pictured(x), x["input_ids"].shape[1]
    given = maps("llava", x)[1][0, image[-1] + 1 :][:, image].sum(-1).mean()  # after the second of three layers
    for threshold, gone in ((float(given) + 1e-4, True), (float(given) - 1e-4, False)):
        layers = held("llava", f"withdraw(at=0.7, threshold={threshold})", x)
        assert len(layers[0]) == len(layers[1]) == n
        assert layers[2] == ([p for p in range(n) if p not in image] if gone else list(range(n)))


def test_transprune_changes_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    given_, made = (torch.randn(1, 4, 5, generator=generator) for _ in range(2))
    change = transition(given_, made, torch.tensor([[-1, 0, 1, 2]]))[0]
    turn = [1 - abs(float(torch.dot(g, m) / g.norm() / m.norm())) for g, m in zip(given_[0, 1:], made[0, 1:], strict=True)]
    share = torch.tensor(turn).softmax(0)
    ratio = made[0, 1:].norm(dim=-1) / given_[0, 1:].norm(dim=-1)
    torch.testing.assert_close(change[1:], ratio * share, atol=1e-5, rtol=1e-5)
    assert float(change[0]) == 0.0


def test_transprune_with_words_only_is_their_mean_attention() -> None:
    x = vlm.inputs("llava", (1,))
    image = pictured(x)
    mean = maps("llava", x)[0][0, image[-1] + 1 :].mean(0)
    plan = falling(Budget.parse("50%"), len(image), 3, 4)
    layers = held("llava", "transprune(words=1.0):50%", x)
    assert [p for p in layers[1] if p in image] == top(mean, plan[0], image)


def test_overlap_counts_shared_core_neurons() -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 7, 20, generator=generator)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, :3] = False
    found = overlap(z, real, 0.4, 0.3)
    for row in range(2):
        votes, tokens = torch.zeros(20), [t for t in range(7) if real[row, t]]
        for t in tokens:
            positive = [i for i in range(20) if z[row, t, i] > 0]
            core = sorted(positive, key=lambda i: -float(z[row, t, i]))[: -(-len(positive) * 4 // 10)]
            votes[core] += 1
        sentence = sorted(range(20), key=lambda i: (-float(votes[i]), i))[:6]
        for t in range(7):
            expected = sum(float(z[row, t, i]) > 0 for i in sentence) if t in tokens else 0
            assert int(found[row, t]) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0.01, 0.9))
def test_the_nucleus_is_the_smallest_set_that_reaches_its_share(values: list[float], lost: float) -> None:
    worth = torch.tensor(values, dtype=torch.float64)
    chosen = nucleus(worth, lost)
    total, count = float(worth.sum()), int(chosen.sum())
    assert float(worth[chosen].sum()) >= (1 - lost) * total - 1e-9
    smaller = float(worth.sort(descending=True).values[: count - 1].sum())
    assert count == 1 or smaller < (1 - lost) * total
    assert count >= int(nucleus(worth, min(0.99, 2 * lost)).sum())


def test_four_stages_at_47_percent_halve_as_in_the_paper() -> None:
    assert falling(Budget.parse("47%"), 576, 32, 4) == {7: 289, 15: 145, 23: 73}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 6), st.floats(0.02, 0.99))
def test_the_schedule_meets_the_mean_or_drops_as_early_as_it_can(layers: int, stages: int, share: float) -> None:
    n = 2880
    plan = falling(Budget(share=share), n, layers, stages)
    ends = sorted(plan)
    counts = [n]
    for layer in range(1, layers):
        counts.append(plan.get(layer - 1, counts[-1]))
    mean = sum(counts) / layers / n
    assert counts == sorted(counts, reverse=True) and min(counts) >= 1
    assert abs(mean - share) < 0.01 or (ends[0] == 0 and mean > share)
    assert stepwise(1.0, [e + 1 for e in ends], [n] * layers) == [n] * layers


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 6), st.floats(0.02, 0.99), st.floats(0.02, 1.0))
def test_a_schedule_that_starts_with_less_meets_the_same_mean(layers: int, stages: int, share: float, left: float) -> None:
    n = 2880
    begins = max(1, round(left * n))
    plan = falling(Budget(share=share), n, layers, stages, (begins,) * layers)
    counts = [begins]
    for layer in range(1, layers):
        counts.append(plan.get(layer - 1, counts[-1]))
    mean = sum(counts) / layers / n
    assert counts == sorted(counts, reverse=True) and min(counts) >= 1
    assert abs(mean - min(share, begins / n)) < 0.01 or (min(plan) == 0 and mean > share)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 40), st.integers(2, 6), st.floats(0.02, 0.99), st.dictionaries(st.integers(0, 38), st.floats(0.05, 1.0)),
)
def test_a_schedule_behind_other_drops_meets_the_same_mean(
    layers: int, stages: int, share: float, drops: dict[int, float]
) -> None:
    n = 2880
    before = thinned((n,) * layers, {layer: round(left * n) for layer, left in drops.items()})
    by_hand = [min([n, *(round(left * n) for at, left in drops.items() if at < layer)]) for layer in range(layers)]
    assert list(before) == by_hand
    plan = falling(Budget(share=share), n, layers, stages, before)
    counts = thinned(before, plan)
    mean = sum(counts) / layers / n
    assert list(counts) == sorted(counts, reverse=True)
    assert all(a <= b for a, b in zip(counts, before, strict=True))
    if share * n * layers >= sum(before):
        assert counts == before
    assert abs(mean - min(share, sum(before) / layers / n)) < 0.01 or (min(plan) == 0 and mean > share)


STAGED = (
    "pyramiddrop", "sparsevlm", "visiondrop", "transprune", "mustdrop(cut=false)", "vflowopt_layers",
    "attention_debias(pyramiddrop)",
)  # fmt: skip


@pytest.mark.parametrize("method", STAGED)
def test_a_budget_is_of_the_whole_picture_whatever_was_dropped_before(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: {"slope": [0.0] * 3, "height": [1.0] * 3})
    x = vlm.inputs("llava", (1,))
    image = pictured(x)

    def counts(recipe: str) -> list[int]:
        return [len(set(layer) & set(image)) for layer in held("llava", recipe, x)]

    first = Budget.parse("40%").tokens(len(image))
    layers = counts(f"divprune:40% + {method}:25%")
    assert layers[0] == first and layers[-1] < first
    assert sum(layers) / 3 == pytest.approx(0.25 * len(image), abs=1.0)
    assert counts(f"divprune:40% + {method}:60%") == [first] * 3  # which allows more than there is


@pytest.mark.parametrize("second", STAGED)
@pytest.mark.parametrize(
    "first", ["fastv(layers=1):60%", "random_drop:30%", "pyramiddrop:70%", "visiondrop:70%", "sparsevlm:60%"]
)
def test_of_two_methods_between_layers_the_second_plans_with_what_the_first_leaves(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both drop after the same layer, or the second before the first: the mean is what the second budget says."""
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: {"slope": [0.0] * 3, "height": [1.0] * 3})
    x = vlm.inputs("llava", (1,))
    image = pictured(x)

    def counts(recipe: str) -> list[int]:
        return [len(set(layer) & set(image)) for layer in held("llava", recipe, x)]

    alone, both = counts(first), counts(f"{first} + {second}:48%")
    assert sum(alone) / 3 > 0.5 * len(image)
    assert sum(both) / 3 == pytest.approx(0.48 * len(image), abs=1.0)
    assert all(a <= b for a, b in zip(both, alone, strict=True))
    assert counts(f"{first} + {second}:90%") == alone  # which allows more than there is


def test_three_methods_between_layers_plan_one_after_another() -> None:
    x = vlm.inputs("llava", (1,))
    image = pictured(x)
    recipe = "divprune:90% + fastv(layers=1):70% + visiondrop:60% + pyramiddrop:45%"
    counts = [len(set(layer) & set(image)) for layer in held("llava", recipe, x)]
    assert counts[0] == Budget.parse("90%").tokens(len(image))
    assert sum(counts) / 3 == pytest.approx(0.45 * len(image), abs=1.0)


def test_who_joined_a_token_that_joins_another_goes_along() -> None:
    request = SimpleNamespace(into=None, adds=None, pictures=torch.zeros(1, 9, dtype=torch.int64))
    layer = SimpleNamespace(request=request, shared_positions=torch.arange(9)[None, None])
    first = Entries(0, 0, torch.tensor([2, 3, 4, 5]), torch.arange(4), 4, 4)
    take_in(layer, first, Merge(torch.tensor([1, 1, 2, 3])))  # 2 joins 3
    second = Entries(0, 0, torch.tensor([3, 4, 5]), torch.arange(1, 4), 4, 4)
    take_in(layer, second, Merge(torch.tensor([2, 2, 2])))  # 3 and 4 join 5
    assert request.into[0].tolist() == [-1, -1, 5, 5, 5, -1, -1, -1, -1]


def test_each_picture_of_a_batch_falls_from_what_is_left_of_it() -> None:
    model, x = vlm.build("qwen2_vl"), vlm.inputs("qwen2_vl", (2, 1))
    with laconic.apply(model, "divprune:12 + pyramiddrop:8") as handle, torch.no_grad():
        model(**x)
        for picture, reduction in zip(handle.entry.pictures, handle.entry.reductions, strict=True):
            assert picture.given == len(reduction.kept) == min(12, len(picture.cells))
        layers = [layer.positions[:, 0] for layer in handle.latest.layers]
    words = [((row != vlm.IMAGE) & (mask > 0)).sum() for row, mask in zip(x["input_ids"], x["attention_mask"], strict=True)]
    for row, pictures in enumerate((2, 1)):
        mean = sum(int((layer[row] >= 0).sum() - words[row]) for layer in layers) / len(layers)
        assert mean == pytest.approx(8 * pictures, abs=pictures)
