"""Tokens that take others in between layers of the language model, against what the stock model computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import vlm
from test_entry import split

import laconic
from laconic.attention.base import Call
from laconic.budget import Budget
from laconic.cache import KVLayer
from laconic.layers import decoder_layers
from laconic.primitives.merge import Merge, density_peaks
from laconic.recipe import Recipe
from laconic.vision.inside import Entries, InsideMethod
from laconic.vision.schedule import falling

FAMILIES = ("llava", "qwen2_vl", "gemma3")


@dataclass
class Stock:
    """What the untouched model computes of one prompt: in its first layer, and between it and the second."""

    attention: torch.Tensor  # (n, n), mean over heads
    keys: torch.Tensor  # (n, head_dim), mean over heads
    hidden: torch.Tensor  # (n, dim)


def stock(family: str, x: dict[str, torch.Tensor]) -> Stock:
    with vlm.eager(family) as model, torch.no_grad():
        out = model(**x, output_attentions=True, output_hidden_states=True)
    with laconic.apply(model, "dense") as handle, torch.no_grad():  # whose cache holds what is behind a window too
        model(**x)
        keys = handle.latest.layers[0].keys[0].mean(0)
    return Stock(out.attentions[0][0].mean(0), keys, out.hidden_states[1][0])


def second_layer(family: str, recipe: str | Recipe, x: dict[str, torch.Tensor], row: int = 0) -> dict[int, torch.Tensor]:
    """What the second layer is given, by position, of one row of a batch."""
    model, got = vlm.build(family), {}

    def catch(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        got["hidden"] = args[0] if args else kwargs["hidden_states"]

    with laconic.apply(model, recipe) as handle, torch.no_grad():
        hook = decoder_layers(model)[1].register_forward_pre_hook(catch, with_kwargs=True)  # behind ours
        model(**x)
        hook.remove()
        positions = handle.latest.layers[1].positions[row, 0].tolist()
    return {p: h for p, h in zip(positions, got["hidden"][row, -len(positions) :], strict=True) if p >= 0}


def pictured(x: dict[str, torch.Tensor]) -> list[int]:
    return (x["input_ids"][0] == vlm.IMAGE).nonzero()[:, 0].tolist()


def top(scores: torch.Tensor, k: int, among: list[int]) -> list[int]:
    return sorted(sorted(among, key=lambda i: (-round(float(scores[i]), 7), i))[:k])


def check_means(got: dict[int, torch.Tensor], members: dict[int, list[int]], known: Stock, image: list[int]) -> None:
    """Every token that is there is the mean of its members; a word, or a token that nobody joined, is as it was."""
    assert set(got) - set(image) == set(range(len(known.hidden))) - set(image)
    assert any(len(group) > 1 for group in members.values())
    for p, hidden in got.items():
        torch.testing.assert_close(hidden, known.hidden[members.get(p, [p])].mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsevlm_recycles_by_hand(family: str) -> None:
    x = vlm.inputs(family, (1,))
    image, known = pictured(x), stock(family, x)
    behind = range(image[-1] + 1, x["input_ids"].shape[1])
    with laconic.apply(vlm.build(family), "sparsevlm:40%") as handle, torch.no_grad():
        vlm.build(family)(**x)
        picture = handle.entry.pictures[0]
    likeness = (picture.features @ picture.text[-len(behind) :].T).softmax(-1).mean(0)
    raters = [w for w, like in zip(behind, likeness.tolist(), strict=True) if like >= float(likeness.mean())]
    assert 0 < len(raters) < len(behind)
    worth = known.attention[raters].sum(0)
    k = falling(Budget.parse("40%"), len(image), len(decoder_layers(vlm.build(family))), 4)[0]
    gone = len(image) - k
    joining, groups = round(0.6 * gone), -(-round(0.6 * gone) // 10)
    got = second_layer(family, "sparsevlm(recycle=0.6):40%", x)
    pure, recycled = top(worth, k - groups, image), top(worth, k + joining, image)
    recycled = [p for p in recycled if p not in pure]
    centres = sorted(set(got) & set(image) - set(pure))
    assert set(pure) < set(got) and len(centres) == groups and set(centres) <= set(recycled)
    members: dict[int, list[int]] = {c: [c] for c in centres}
    for p in sorted(set(recycled) - set(centres)):
        members[min(centres, key=lambda c, p=p: float((known.keys[p] - known.keys[c]).norm()))].append(p)
    check_means(got, members, known, image)
    assert set(second_layer(family, "sparsevlm(recycle=0):40%", x)) & set(image) == set(top(worth, k, image))


@pytest.mark.parametrize("family", FAMILIES)
def test_visiondrop_merges_by_hand(family: str) -> None:
    x = vlm.inputs(family, (1,))
    image, known = pictured(x), stock(family, x)
    pure = set(second_layer(family, "visiondrop(contextual=0):60%", x)) & set(image)
    few = round(0.3 * len(pure))
    got = second_layer(family, "visiondrop(contextual=0.3):60%", x)
    kept = set(got) & set(image)
    assert len(kept) == len(pure)
    keys = torch.nn.functional.normalize(known.keys, dim=-1)
    received = scores_within(family, known, image)
    dominant = top(received, len(pure) - few, image)
    rest = [p for p in image if p not in dominant]
    targets = [rest[int((i + 0.5) * len(rest) / few)] for i in range(few)]
    assert kept == set(dominant) | set(targets)
    members = {t: [t] for t in targets}
    for p in sorted(set(rest) - set(targets)):
        members[max(targets, key=lambda t, p=p: float(keys[p] @ keys[t]))].append(p)
    check_means(got, members, known, image)


def scores_within(family: str, known: Stock, image: list[int]) -> torch.Tensor:
    """Attention from picture to picture, rows and columns weighed so that even attention gives every token 1."""
    own = known.attention[image][:, image]
    sees = torch.ones_like(own) if family == "gemma3" else torch.ones_like(own).tril()
    weighed = own / own.sum(-1, keepdim=True) * sees.sum(-1, keepdim=True)
    scores = torch.zeros(len(known.hidden))
    scores[image] = weighed.sum(0) / sees.sum(0)
    return scores


@dataclass(frozen=True, kw_only=True)
class Pairs(InsideMethod):
    """After the first layer, every second token of a picture joins the one before it."""

    id: ClassVar[str] = "pairs"
    paper: ClassVar[str] = "test"

    def stays(self, n: int, given: tuple[int, ...]) -> dict[int, int]:
        return {0: (n + 1) // 2}

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        return torch.zeros(layer.shared_positions[:, 0].shape)

    def reduce(self, layer: KVLayer, picture: Entries, worth: torch.Tensor, k: int) -> Merge:
        return Merge(torch.arange(len(worth)) // 2 * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_several_pictures_merges_as_each_prompt_alone(family: str) -> None:
    x, recipe = vlm.inputs(family, (2, 1)), Recipe((Pairs(budget="50%"),))
    for row, alone in enumerate(split(family, x, (2, 1))):
        single, known = second_layer(family, recipe, alone), stock(family, alone)
        for p, hidden in second_layer(family, recipe, x, row).items():
            torch.testing.assert_close(hidden, single[p], atol=1e-4, rtol=1e-4)
        image = pictured(alone)
        takers = [p for p in image if p in single]
        assert len(takers) == len(image) // 2
        for p in takers:
            assert p + 1 in image and p + 1 not in single
            torch.testing.assert_close(single[p], known.hidden[[p, p + 1]].mean(0), atol=1e-4, rtol=1e-4)


def test_what_another_method_drops_after_the_same_layer_takes_nobody_in() -> None:
    x = vlm.inputs("llava", (1,))
    image, known = pictured(x), stock("llava", x)
    fast = set(second_layer("llava", "fastv(layers=1):40%", x))
    got = second_layer("llava", Recipe((Pairs(budget="50%"), *Recipe.parse("fastv(layers=1):40%").methods)), x)
    left = set(got) & set(image)
    assert fast & set(image[::2]) <= left < set(image[::2]) and len(left) == len(fast & set(image))
    for p in left:
        torch.testing.assert_close(got[p], known.hidden[[p, p + 1]].mean(0), atol=1e-4, rtol=1e-4)


def test_a_debiased_method_merges_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: {"slope": [0.0] * 3, "height": [1.0] * 3})
    x = vlm.inputs("llava", (1,))
    recipes = "visiondrop:50%", "attention_debias(visiondrop, padding=false):50%"
    plain, debiased = (second_layer("llava", recipe, x) for recipe in recipes)
    assert set(plain) == set(debiased) and all(torch.equal(plain[p], debiased[p]) for p in plain)


def test_centres_lie_where_points_are_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = torch.cat([m + 0.3 * torch.randn(12, 2, generator=generator) for m in middles])
    centres, member = density_peaks(points, 3)
    assert (centres // 12).tolist() == [0, 1, 2]
    assert torch.equal(member, centres.repeat_interleave(12))
    centres, member = density_peaks(torch.zeros(5, 2), 2)  # all alike: the first, and each centre is its own
    assert centres.tolist() == [0, 1] and member.tolist() == [0, 1, 0, 0, 0]
    assert [part.tolist() for part in density_peaks(torch.ones(1, 3), 1)] == [[0], [0]]


def test_shares_that_leave_no_room_are_refused() -> None:
    with pytest.raises(laconic.LaconicError, match="less than 1"):
        laconic.get("visiondrop", contextual=1.0)
    with pytest.raises(laconic.LaconicError, match="at most 1"):
        laconic.get("sparsevlm", recycle=1.5)
