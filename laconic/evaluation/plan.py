"""Which cells a comparison has: methods x budgets, dense first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from laconic.budget import Budget
from laconic.method import Method
from laconic.recipe import Recipe

DEFAULT_METHODS = (
    "dense", "random", "streaming", "knorm", "tova", "snapkv", "h2o", "tokenselect", "recycled_attention",
)  # fmt: skip
DEFAULT_BUDGETS = ("5%", "10%", "20%", "50%")
PICTURE_METHODS = ("dense", "random_prune", "uniform", "vtc_cls", "divprune", "idpruner", "visionzip", "fastv", "pyramiddrop")
PICTURE_BUDGETS = ("5.6%", "11.1%", "33.3%")


@dataclass(frozen=True)
class Cell:
    """One method at one budget. ``name`` and ``budget`` are what reports show; ``recipe`` is what is applied."""

    name: str
    budget: str
    recipe: Recipe

    @property
    def key(self) -> str:
        return str(self.recipe)

    @property
    def label(self) -> str:
        return self.name if self.name == "dense" else f"{self.name}:{self.budget}"


def plan(
    methods: Sequence[str | Method | Recipe] | str | None,
    budgets: Sequence[str | int | Budget] | str | None,
    *,
    pictures: bool = False,
) -> list[Cell]:
    """The cells in order, dense first, each once. Unknown methods and impossible budgets are refused here.

    ``pictures``: what is chosen where nobody says is meant for pictures.
    """
    usual, sizes_of = (PICTURE_METHODS, PICTURE_BUDGETS) if pictures else (DEFAULT_METHODS, DEFAULT_BUDGETS)
    chosen = [methods] if isinstance(methods, (str, Method, Recipe)) else list(methods or usual)
    sizes = [budgets] if isinstance(budgets, (str, int, Budget)) else list(budgets or sizes_of)
    parsed = [Budget.parse(size) for size in sizes]
    cells = [Cell("dense", "100%", Recipe.parse("dense"))]
    for entry in chosen:
        recipe = Recipe.parse(entry)
        name = display_name(recipe)
        if name == "dense":
            continue
        if len(recipe.methods) == 1 and not recipe.methods[0].takes_budget:
            cells.append(Cell(name, "100%", recipe))
            continue
        written = isinstance(entry, str) and ":" in entry.rsplit(")")[-1]
        if len(recipe.methods) > 1 or written or not recipe.methods[0].budget.is_full:
            cells.append(Cell(name, str(recipe.methods[-1].budget), recipe))
            continue
        for size in parsed:
            sized = Recipe((dataclasses.replace(recipe.methods[0], budget=size),))
            cells.append(Cell(name, str(size), sized))
    return list({cell.key: cell for cell in cells}.values())


def display_name(recipe: Recipe) -> str:
    """A single method without its budget, ``tokenselect(refresh=0.95)``; a composition as it is."""
    if len(recipe.methods) > 1:
        return str(recipe)
    method = recipe.methods[0]
    return str(method).removesuffix(f":{method.budget}")
