"""benchmarks/faithful_code.py: pairs of answers, and the model that sees pictures in parts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from laconic.models.scenes import examples

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faithful_code.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_faithful_code", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_asked_has_a_released_way(script: Any) -> None:
    for name in (*script.METHODS, *script.PARTED):
        (method,) = laconic.Recipe.parse(script.as_released(name)).methods
        assert method.faithful_code and not laconic.Recipe.parse(name).methods[0].faithful_code


def row(recipe: str, right: list[float]) -> dict[str, Any]:
    kinds = ["colour", "count"] * (len(right) // 2)
    cells = [{"meta": {"type": kind}, "correct": value} for kind, value in zip(kinds, right, strict=True)]
    return {"recipe": recipe, "budget": "33%", "quality": sum(right) / len(right), "cells": cells, "kept_share": 0.34}


def test_pairs_are_compared_answer_by_answer(script: Any) -> None:
    rows = [
        row("dense", [1, 1, 1, 1]),
        row("attention_debias(pyramiddrop):33%", [1, 0, 1, 0]),
        row("attention_debias(pyramiddrop, faithful_code=True):33%", [1, 1, 1, 0]),
    ]
    (pair,) = script.pairs(rows)
    assert pair["method"] == "attention_debias(pyramiddrop)" and (pair["default"], pair["released"]) == (0.5, 0.75)
    assert pair["change"] == 0.25 and pair["half_interval"] == pytest.approx(1.96 * 0.25)  # sd 0.5 over the root of 4
    assert pair["kinds"] == {"colour": [1.0, 1.0], "count": [0.0, 0.5]}
    assert script.difference([1, 0, 1], [1, 0, 1]) == (0.0, 0.0)


def test_the_model_in_parts_answers_what_the_whole_model_does(script: Any, tmp_path: Path) -> None:
    model, processor = laconic.load(str(script.in_parts(tmp_path / "model")))
    scene, question = next(examples(10**6, "colour"))
    inputs = processor(images=scene.render(), text=f"<image> {question.text}", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 5, 3, 168, 168)
    with laconic.apply(model, "hired:50%") as handle, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        layout = handle.entry.pictures[0].layout
    assert layout.parts == (2, 2) and len(layout.shapes) == 5 and set(layout.shapes) == {(12, 12)}
    assert processor.tokenizer.decode(out[0, -1:]).strip() == question.answer
