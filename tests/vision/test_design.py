"""Methods put together by name are the published ones where they say the same, and keep to their budgets everywhere."""

from __future__ import annotations

import pytest
import torch
from made import in_parts, picture

import laconic
from laconic.vision.regions import REGIONS
from laconic.vision.scores import SCORES
from laconic.vision.select import SELECTIONS


def made(n: int = 64, parts: bool = False):
    generator = torch.Generator().manual_seed(3)
    layout = in_parts(2, 2, 4) if parts else None
    count, crops = (80, 5) if parts else (n, 1)
    attention = torch.rand(crops, count // crops, generator=generator)
    return picture(
        torch.randn(count, 12, generator=generator), layout, text=torch.randn(5, 12, generator=generator), cls=attention,
        received=attention.flip(-1), keys=torch.randn(crops, 2, 1 + count // crops, 6, generator=generator),
    )  # fmt: skip


SAME = {
    "divprune": "score=none, select=farthest",
    "idpruner": "score=salience, select=relevant",
    "uniform": "select=even",
    "random_prune": "select=random",
    "holov(variety=0)": "regions=salient_tiles",
    "vtc_cls(first=-2)": "score=salience, select=best",
}


@pytest.mark.parametrize("published", SAME)
@pytest.mark.parametrize("k", [1, 7, 30])
def test_settings_that_are_published_methods(published: str, k: int) -> None:
    (method,), (design,) = (laconic.Recipe.parse(r).methods for r in (f"{published}:{k}", f"design({SAME[published]}):{k}"))
    assert torch.equal(design.reduce(made(), k).kept, method.reduce(made(), k).kept)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("select", SELECTIONS)
def test_every_cell_keeps_its_budget_and_merging_loses_nothing(select: str, regions: str, parts: bool) -> None:
    shown = made(parts=parts)
    for score in SCORES:
        for k in (3, 17):
            method = laconic.get("design", score=score, select=select, regions=regions, rest="merge", budget=str(k))
            reduction = method.reduce(shown, k)
            assert len(reduction.kept) == k and bool((reduction.kept.diff() > 0).all())
            assert torch.equal(reduction.into[reduction.kept], reduction.kept) and bool((reduction.into >= 0).all())
            share = torch.bincount(reduction.into, minlength=len(shown.layout))[reduction.kept].float()
            torch.testing.assert_close((reduction.features * share[:, None]).sum(0), shown.features.sum(0), atol=1e-3, rtol=1e-3)


def test_the_selections_differ() -> None:
    shown = made()
    sets = {
        name: tuple(laconic.get("design", select=name, budget="20").reduce(shown, 20).kept.tolist()) for name in SELECTIONS
    }
    assert len(set(sets.values())) == len(SELECTIONS)


def test_covering_is_greedy_by_brute_force() -> None:
    shown, k = made(25), 6
    worth = shown.salience(-2)
    weight = (worth - worth.min()) / (worth.max() - worth.min())
    unit = torch.nn.functional.normalize(shown.features, dim=-1)
    cosine, cover, kept = unit @ unit.t(), torch.zeros(25), []
    for _ in range(k):
        gain = weight * (cosine - cover).clamp(min=0).sum(-1)
        gain[kept] = -1
        kept.append(int(gain.argmax()))
        cover = torch.maximum(cover, cosine[kept[-1]])
    assert laconic.get("design", select="covering", budget="6").reduce(shown, k).kept.tolist() == sorted(kept)


def test_an_unknown_name_is_one_sentence() -> None:
    with pytest.raises(laconic.LaconicError, match="select is one of best"):
        laconic.get("design", select="wisely", budget="9")
