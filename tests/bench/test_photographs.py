"""The benchmark on real photographs, in its quick form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("skimage")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "photographs.py"


def test_it_prints_what_methods_save_and_what_choices_cost(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("photographs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--quick", "--photos", "coffee", "cat"])
    found = json.loads(capsys.readouterr().out)
    assert found["photos"] == ["coffee"] and list(found["first_token"]) == list(module.METHODS[:2])
    assert all(row["median"] > 0 for row in found["first_token"].values())
    for rule, row in found["choice"].items():
        assert row["ms"]["median"] > 0 and row["ratio"]["median"] > 0
        assert row["same"]["least"] >= 0.98, rule  # near ties may fall either way
