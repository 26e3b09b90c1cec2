"""Looking at what stays, and comparing on pictures, with a random model of the built-in architecture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import vlm
from PIL import Image
from test_merging_inside import Pairs
from typer.testing import CliRunner

import laconic
from laconic.cli import app
from laconic.models.reading import open_picture
from laconic.models.scenes import make_scene
from laconic.models.shapes_processor import VARIANTS
from laconic.vision.overlay import grids, overlay
from laconic.vision.picture import grid
from laconic.vision.see import Shown, see, shown, taken_in

runner = CliRunner()


def test_views_say_what_the_cache_holds(folder: str) -> None:
    model, processor = laconic.load(folder)
    scene = make_scene(np.random.default_rng(0))
    views, pictures = see(model, processor, [scene], "what colour is the star ?", ["uniform:10%", "fastv:50%"], max_new_tokens=3)
    assert [view.recipe for view in views] == ["dense", "uniform:10%", "fastv:50%"]
    assert views[0].pictures == [] and pictures[0].size == (336, 336)
    assert views[1].pictures[0].kept == 58 and float(views[1].pictures[0].depth.sum()) == 58
    depth = views[2].pictures[0].depth
    assert int((depth == 1).sum()) == 288 and torch.allclose(depth[depth < 1], torch.tensor(2 / 6))
    shown = np.asarray(pictures[0]).astype(int)
    assert np.abs(shown - np.asarray(scene.render()).astype(int)).max() <= 2  # as the encoder saw it is as it was drawn


def test_overlays_show_what_stays_as_it_is_and_fade_the_rest() -> None:
    picture = Image.fromarray(np.full((40, 40, 3), (200, 30, 60), dtype=np.uint8))
    depth = torch.zeros(16)
    depth[[0, 5]] = 1.0
    into = torch.arange(16).masked_fill(depth == 0, -1)
    into[6] = 5
    shown = Shown(grid(4, 4), depth, into)
    pixels = np.asarray(overlay(picture, shown, side=80)).astype(int)
    assert tuple(pixels[10, 10]) == (200, 30, 60) and tuple(pixels[30, 30]) == (200, 30, 60)
    assert pixels[70, 70].min() > 200  # faded
    assert pixels[30, 50, 2] > pixels[30, 50, 0]  # merged: blue
    stays, merged = grids(shown, 0)
    assert stays.sum() == 2 and merged.sum() == 1 and merged[1, 2] == 1


def looked_at(recipe: str | laconic.Recipe) -> list[Shown]:
    model, x = vlm.build("llava"), vlm.inputs("llava", (2,))
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        model.generate(**x, max_new_tokens=2, do_sample=False)
        model(**x)
        return shown(handle, x["input_ids"])


def test_tokens_that_merge_between_layers_are_shown() -> None:
    for picture in looked_at(laconic.Recipe((Pairs(budget="50%"),))):
        assert picture.into.tolist() == [i // 2 * 2 for i in range(64)] and picture.kept == 32
        assert torch.allclose(picture.depth[1::2], torch.tensor(1 / 3))
        _, merged = grids(picture, 0)
        assert merged[:, 1::2].all() and not merged[:, ::2].any()
        plain, tinted = (
            np.asarray(overlay(Image.new("RGB", (32, 32)), Shown(picture.layout, picture.depth, into), side=32)).astype(int)
            for into in (None, picture.into)
        )
        blue = tinted[..., 2] - tinted[..., 0] - (plain[..., 2] - plain[..., 0])
        assert blue[1:-1, 5:7].min() > 20 and abs(blue[:, :4]).max() == 0  # the second patch of every pair
    for recipe in ("sparsevlm(recycle=0.6):40%", "visiondrop(contextual=0.3):60%"):
        for picture in looked_at(recipe):
            last = picture.depth == 1
            assert torch.equal((picture.into == torch.arange(64)), last)
            joined = (picture.into >= 0) & ~last
            assert int(joined.sum()) > 3 and bool((picture.depth[joined] < 1).all())
    assert all(picture.into is None for picture in looked_at("fastv(layers=1):40%"))


def test_what_merged_before_the_first_layer_and_between_them() -> None:
    slots, before = torch.arange(4, 10), torch.tensor([0, 0, 2, 3, -1, 5])
    merged = torch.full((12,), -1)
    merged[6] = 4  # the third token, between layers
    stays = torch.tensor([True, False, False, False, False, True])
    assert taken_in(slots, stays, before, merged).tolist() == [0, 0, 0, -1, -1, 5]  # the fourth left in between
    assert taken_in(slots, stays, None, merged).tolist() == [0, -1, 0, -1, -1, 5]


def test_the_command_writes_pictures_and_a_page(folder: str, tmp_path: Path) -> None:
    for name in ("out.png", "out.html"):
        command = ["see", "scene:1", "--model", folder, "--method", "divprune:5%", "--method", "tome:5%", "--json"]
        result = runner.invoke(app, [*command, "-o", str(tmp_path / name), "--max-new-tokens", "2"])
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert [view["recipe"] for view in found["views"]] == ["dense", "divprune:5%", "tome:5%"]
        assert found["views"][1]["pictures"] == [{"tokens": 576, "kept": 29}]
    assert open_picture(tmp_path / "out.png").width > 900
    page = (tmp_path / "out.html").read_text()
    assert page.count('title="token ') == 2 * 576 and "merged into token" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.png", "what ?"], "no picture"),
        (["scene:x"], "whole number"),
        (["scene:1", "--method", "nothing:5%"], "no method"),
        (["scene:1", "-o", "/no/such/folder/x.png"], "cannot be written"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(folder: str, arguments: list[str], sentence: str) -> None:
    result = runner.invoke(app, ["see", *arguments, "--model", folder, "--max-new-tokens", "1"])
    assert result.exit_code == 2 and sentence in result.stderr


def test_a_comparison_on_pictures_has_a_gallery_and_kinds(folder: str, tmp_path: Path) -> None:
    report = laconic.compare(
        folder, methods=["uniform", "fastv"], budgets=["10%"], samples=6, output=tmp_path / "report", progress=False
    )
    assert [row["method"] for row in report.rows] == ["dense", "uniform", "fastv"]
    assert report.rows[1]["bytes_kept"] < 0.2 * report.rows[0]["bytes_kept"]
    shown = json.loads((tmp_path / "report" / "gallery.json").read_text())
    assert len(shown) == 3 and [e["method"] for e in shown[0]["entries"]] == ["dense", "uniform", "fastv"]
    page = report.html.read_text()
    assert "What stays of the pictures" in page and "By kind of question" in page and page.count("data:image/jpeg") == 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_learns_something_in_a_few_steps(variant: str) -> None:
    """The encoder's extra loss and the answers' loss fall on a batch that is shown again and again."""
    from laconic.models import train_shapes

    torch.manual_seed(0)
    model = train_shapes.build_model(variant)
    heads = train_shapes.Heads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
    batch = train_shapes.SceneMaker(0, variant).batch((56, 2, 24))
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3)
    before = None
    for _ in range(12):
        loss, extra, _ = train_shapes.losses(model, heads, batch)
        before = before or (loss.item(), extra.item())
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
    assert loss.item() < 0.6 * before[0] and extra.item() < before[1]
