"""The benchmark on real photographs, in its quick form, on a picture of our own: the photographs are in an extra."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from laconic.models.scenes import make_scene

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "photographs.py"


def test_it_prints_what_methods_save_and_what_choices_cost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("photographs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make_scene(np.random.default_rng(0)).render().save(tmp_path / "scene.png")
    monkeypatch.setattr(module, "photo_path", lambda name: tmp_path / "scene.png")
    module.main(["--quick", "--photos", "coffee", "cat"])
    found = json.loads(capsys.readouterr().out)
    assert found["photos"] == ["coffee"] and list(found["first_token"]) == list(module.METHODS[:2])
    assert all(row["median"] > 0 for row in found["first_token"].values())
    for rule, row in found["choice"].items():
        assert row["ms"]["median"] > 0 and row["ratio"]["median"] > 0
        assert row["alike"]["least"] > 20, rule
        if rule != "determinant":  # once the directions of the tokens are used up, nothing adds anything to it
            assert row["same"]["least"] >= 0.98, rule  # near ties may fall either way
