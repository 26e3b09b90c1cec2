"""The trend of attention over a picture: measured, taken out of the scores, and padding with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vlm

import laconic
from laconic import profiles
from laconic.vision.attention_debias import AttentionDebias, fit
from laconic.vision.picture import bar_cells


def slope(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: {"slope": [value] * 4, "height": [1.0] * 4})


def kept(recipe: str, x: dict[str, torch.Tensor]) -> list[int]:
    with laconic.apply(vlm.build("llava"), recipe) as handle, torch.no_grad():
        vlm.build("llava")(**x)
        image = (x["input_ids"][0] == vlm.IMAGE).nonzero()[:, 0]
        held = handle.latest.layers[-1].positions[0, 0]
        return (image[torch.isin(image, held)] - image[0]).tolist()


def test_the_fit_finds_an_exponential() -> None:
    at = np.repeat(np.arange(576) / 576, 3)
    slope_, height = fit(at, 0.004 * np.exp(1.3 * at))
    assert slope_ == pytest.approx(1.3, abs=0.02) and height == pytest.approx(0.004, rel=0.03)


def test_without_a_trend_the_method_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    slope(monkeypatch, 0.0)
    x = vlm.inputs("llava", (1,))
    assert kept("attention_debias(fastv(layers=1), padding=false):30%", x) == kept("fastv(layers=1):30%", x)


def test_a_steep_trend_turns_the_choice_to_early_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    slope(monkeypatch, 1e3)
    assert kept("attention_debias(fastv(layers=1)):16", vlm.inputs("llava", (1,))) == list(range(16))


def test_padding_is_never_kept_while_anything_else_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    slope(monkeypatch, 0.0)
    x = vlm.inputs("llava", (1,))
    x["pixel_values"][:, :, :8] = 0.3  # two rows of patches at the top, three columns at the right
    x["pixel_values"][:, :, :, 20:] = 0.3
    bars = {r * 8 + c for r in range(8) for c in range(8) if r < 2 or c >= 5}
    assert not bars & set(kept("attention_debias(fastv(layers=1)):26", x))
    assert len(kept("attention_debias(fastv(layers=1)):40", x)) == 40


def test_bars_are_found_at_all_edges_and_a_plain_picture_has_none() -> None:
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not bool(bar_cells(pixels, 8, 8).any())
    pixels[:, 28:], pixels[:, :, :4] = 0.5, 0.5
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[7], expected[:, 0] = True, True
    assert torch.equal(bar_cells(pixels, 8, 8), expected)
    assert not bool(bar_cells(torch.ones(3, 32, 32), 8, 8).any())


def test_a_profile_is_made_of_pictures_and_fits_its_model(tmp_path) -> None:
    model = vlm.build("llava")
    prompts = [vlm.inputs("llava", (1,), seed=seed) for seed in range(3)]
    made = profiles.make_profile("attention_debias", model, prompts, seed=0)
    assert len(made.tables["slope"]) == 3 and all(np.isfinite(made.tables["slope"]))
    made.save(tmp_path / "debias.json")
    recipe = f"attention_debias(profile={tmp_path / 'debias.json'}):20%"
    with laconic.apply(model, recipe), torch.no_grad():
        model(**prompts[0])
    other = vlm.build("llava_siglip")
    with laconic.apply(other, recipe), torch.no_grad(), pytest.raises(laconic.LaconicError, match="another model"):
        other(**vlm.inputs("llava_siglip"))
    with laconic.apply(model, "attention_debias:20%"), pytest.raises(laconic.LaconicError, match="laconic profile"):
        model(**prompts[0])


@pytest.mark.parametrize("of", ["divprune", "tokenselect", "attention_debias", "nobody", "withdraw"])
def test_only_methods_with_scores_can_be_debiased(of: str) -> None:
    with pytest.raises(laconic.LaconicError):
        AttentionDebias(of=of)
