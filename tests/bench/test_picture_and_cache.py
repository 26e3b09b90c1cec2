"""The benchmark of shortened pictures and a cache that is read in part, in its quick form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "picture_and_cache.py"


def test_it_prints_what_both_save(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("picture_and_cache", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--quick"])
    found = json.loads(capsys.readouterr().out)
    dense, picture, cache, both = (found["rows"][recipe] for recipe in module.RECIPES)
    assert found["samples"] == 2 and dense["less"] == dict.fromkeys(module.COSTS, 1.0) and dense["same_first_token"] == 1
    assert picture["bytes_kept"] == both["bytes_kept"] < 0.25 * dense["bytes_kept"] == 0.25 * cache["bytes_kept"]
    assert cache["bytes_read"] < dense["bytes_read"] and both["bytes_read"] < picture["bytes_read"] < cache["bytes_read"]
    assert all(row["prefill_ms"] > 0 and row["step_ms"] > 0 and 0 <= row["right"] <= 1 for row in found["rows"].values())
