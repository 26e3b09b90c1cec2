"""What is measured once about a model: kept, found, and refused when it is of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import build, prompt, shared
from typer.testing import CliRunner

import laconic
from laconic.cli import app
from laconic.errors import LaconicError
from laconic.profiles import Profile, find_profile, fingerprint, make_profile


@pytest.fixture
def made() -> Profile:
    return make_profile("fasa", shared(), list(prompt(2, 40)["input_ids"]), seed=3)


def test_a_profile_comes_back_from_its_file(made: Profile, tmp_path: Path) -> None:
    made.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == made
    assert made.model == fingerprint(shared()) and made.seed == 3
    assert find_profile("fasa", str(tmp_path / "p.json"), shared()) == made.tables


def test_the_data_and_the_model_tell_profiles_apart(made: Profile) -> None:
    other = make_profile("fasa", shared(), list(prompt(2, 40, seed=8)["input_ids"]), seed=3)
    assert other.data != made.data and other.model == made.model
    assert fingerprint(build(seed=1)) != made.model != fingerprint(build("qwen3"))


def test_what_is_missing_or_of_another_names_the_command(made: Profile, tmp_path: Path) -> None:
    path = str(tmp_path / "p.json")
    made.save(path)
    for arguments in (("fasa", "", shared()), ("fasa", path, build(seed=1)), ("other", path, shared())):
        with pytest.raises(LaconicError, match=r"laconic profile \w+ --model MODEL --output FILE") as error:
            find_profile(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(LaconicError, match="cannot be read"):
        find_profile("fasa", str(tmp_path / "none.json"), shared())
    (tmp_path / "bad.json").write_text('{"method": 1}')
    with pytest.raises(LaconicError, match="is not a profile"):
        find_profile("fasa", str(tmp_path / "bad.json"), shared())
    with pytest.raises(LaconicError, match="knorm needs no profile"):
        make_profile("knorm", shared(), [torch.arange(9)], 0)
    with pytest.raises(LaconicError, match="cannot be written"):
        made.save(tmp_path)


def test_the_built_in_model_brings_its_own() -> None:
    model, tokenizer = laconic.load("needle")
    assert len(find_profile("fasa", "", model)["ranking"]) == 3
    with laconic.apply(model, "fasa:20") as handle:
        model.generate(**tokenizer("All is well that ends well. " * 20, return_tensors="pt"), max_new_tokens=3)
        assert handle.stats()["kept"] == 20
    with pytest.raises(LaconicError, match="needs a profile"), laconic.apply(shared(), "fasa:20"):
        shared().generate(**prompt(), max_new_tokens=2)


def test_the_command_writes_one(tmp_path: Path) -> None:
    path = tmp_path / "fasa.json"
    arguments = ["profile", "fasa", "--output", str(path), "--samples", "1", "--tokens", "256"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and str(path) in result.stdout.replace("\n", ""), result.stderr
    assert json.loads(path.read_text())["method"] == "fasa"
    model, _ = laconic.load("needle")
    assert find_profile("fasa", str(path), model)["rope"] == "half"
    assert CliRunner().invoke(app, ["profile", "h2o", "--output", str(path)]).exit_code == 2
