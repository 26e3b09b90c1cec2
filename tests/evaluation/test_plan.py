"""Which cells a comparison has."""

from __future__ import annotations

import pytest

import laconic
from laconic.errors import LaconicError
from laconic.evaluation.plan import plan


def test_dense_comes_first_and_each_cell_once() -> None:
    cells = plan(["h2o", "dense", "tokenselect:16", "h2o"], ["10%", "10%", "16"])
    assert [cell.key for cell in cells] == ["dense", "h2o:10%", "h2o:16", "tokenselect:16"]
    assert [(cell.name, cell.budget) for cell in cells][:2] == [("dense", "100%"), ("h2o", "10%")]
    assert [cell.label for cell in cells] == ["dense", "h2o:10%", "h2o:16", "tokenselect:16"]


def test_the_default_is_eight_methods_at_four_budgets_beside_dense() -> None:
    cells = plan(None, None)
    assert len(cells) == 1 + 8 * 4 and len({cell.name for cell in cells}) == 9


def test_parameters_belong_to_the_name_and_budgets_do_not() -> None:
    (_, cell) = plan("tokenselect(refresh=0.5)", "64")
    assert (cell.name, cell.budget, cell.key) == ("tokenselect(refresh=0.5)", "64", "tokenselect(refresh=0.5):64")


def test_methods_from_python() -> None:
    full, fixed = laconic.get("h2o"), laconic.get("h2o", budget="32")
    assert [cell.key for cell in plan([full], ["10%", "20%"])] == ["dense", "h2o:10%", "h2o:20%"]
    assert [cell.key for cell in plan([fixed], ["10%", "20%"])] == ["dense", "h2o:32"]
    assert [cell.key for cell in plan(fixed, 10)] == ["dense", "h2o:32"]


def test_a_composition_brings_its_budgets() -> None:
    (_, cell) = plan("snapkv:50% + tokenselect:64", ["10%", "20%"])
    assert cell.key == cell.name == "snapkv:50% + tokenselect:64"


def test_a_written_full_budget_is_one_cell() -> None:
    assert [cell.budget for cell in plan(["h2o:100%"], ["10%", "20%"])] == ["100%", "100%"]


@pytest.mark.parametrize("budget", ["0", "-5", "150%", "0%", "ten", ""])
def test_impossible_budgets(budget: str) -> None:
    with pytest.raises(LaconicError, match="Budget"):
        plan(["h2o"], [budget])


def test_methods_that_take_no_budget_have_one_cell() -> None:
    cells = plan(["zerotuning(gamma=2)", "knorm"], ["5%", "10%"])
    assert [cell.label for cell in cells] == ["dense", "zerotuning(gamma=2.0):100%", "knorm:5%", "knorm:10%"]
