"""Photographs by name; those of a package that is not installed are skipped."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import laconic
from laconic.cli import app
from laconic.models.reading import open_picture
from laconic.vision.photos import PACKAGES, PHOTOS, photo_path
from laconic.vision.see import picture_named

runner = CliRunner()
HERE = [name for name, path in PHOTOS.items() if find_spec(path.partition("/")[0]) is not None]
needs_photos = pytest.mark.skipif(len(HERE) < len(PHOTOS), reason="the extra 'photos' is not installed")


@needs_photos
@pytest.mark.parametrize("name", sorted(PHOTOS))
def test_a_photo_is_a_picture_with_something_on_it(name: str) -> None:
    pixels = np.asarray(open_picture(photo_path(name)))
    assert min(pixels.shape[:2]) > 150 and pixels.shape[2] == 3
    assert len(np.unique(pixels)) > 150 and pixels.std() > 20


@needs_photos
def test_two_photos_in_one_prompt_are_seen_and_shortened(folder: str, tmp_path: Path) -> None:
    output = tmp_path / "seen.png"
    arguments = ["see", "photo:coffee", "what is this ?", "--also", "photo:cat", "--model", folder, "--method", "divprune:10%"]
    result = runner.invoke(app, [*arguments, "--output", str(output), "--max-new-tokens", "2", "--json"])
    assert result.exit_code == 0, result.output
    views = json.loads(result.stdout)["views"]
    assert views[1]["pictures"] == [{"tokens": 576, "kept": 58}] * 2
    assert np.asarray(Image.open(output)).std() > 20


def test_a_picture_is_named_by_its_kind_or_its_path() -> None:
    assert picture_named("photo.jpg") == ("photo.jpg", None) and picture_named("photo") == ("photo", None)
    scene, question = picture_named("scene:3")
    assert question and scene.render().size == (336, 336)


def test_an_unknown_photo_lists_those_there_are(folder: str) -> None:
    for name in ("", "teapot"):
        with pytest.raises(laconic.LaconicError, match=r"no photo .*choose one of astronaut, camera, cat, .*rocket"):
            photo_path(name)
    result = runner.invoke(app, ["see", "photo:", "--model", folder])
    assert result.exit_code == 2 and "astronaut" in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["coffee", "china"])
def test_a_missing_package_is_named_with_its_extra(
    name: str,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("laconic.vision.photos.find_spec", lambda _: None)
    result = runner.invoke(app, ["see", f"photo:{name}", "What is this?", "--model", folder])
    package = PACKAGES[PHOTOS[name].partition("/")[0]]
    assert result.exit_code == 2 and f"comes with {package}" in result.stderr and "pip install 'laconic[photos]'" in result.stderr


def test_the_extra_holds_the_packages() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["photos"]
    assert {requirement.partition(">=")[0] for requirement in extra} == set(PACKAGES.values())
