"""The built-in model that sees: it is there, it answers, and what is left out of a picture matters to it."""

from __future__ import annotations

from typing import Any

import pytest

import laconic
from laconic.evaluation.measure import Runner, prepare
from laconic.evaluation.picture_tasks import make_task
from laconic.models import ZOO
from laconic.models.train_shapes import build_model


@pytest.fixture(scope="module")
def shapes() -> tuple[Any, Any]:
    return laconic.load("shapes")


def right(shapes: tuple[Any, Any], recipe: str, samples: int = 36) -> float:
    """Share of held-out questions that are answered right."""
    model, processor = shapes
    runner, items = Runner(model, processor), prepare(make_task("shapes_vqa", samples, 0).examples, processor)
    with laconic.apply(model, recipe) as handle:
        said = [runner.text(runner.run(item, handle).own) for item in items]
    return sum(a.split() == item.example.answer.split() for a, item in zip(said, items, strict=True)) / samples


def test_it_answers_held_out_questions_and_needs_the_picture_for_it(shapes: tuple[Any, Any]) -> None:
    dense = right(shapes, "dense")
    assert dense >= 0.8
    assert right(shapes, "random_prune:1") < dense - 0.25


def test_it_is_what_its_command_builds(shapes: tuple[Any, Any]) -> None:
    expected = {name: weight.shape for name, weight in build_model().named_parameters()}
    assert {name: weight.shape for name, weight in shapes[0].named_parameters()} == expected
    assert sum(file.stat().st_size for file in (ZOO / "shapes").rglob("*") if file.is_file()) < 16e6
