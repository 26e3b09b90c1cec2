"""What ``laconic tune`` searches: methods, their budgets, and the parameters that they declare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laconic.budget import SHAPES, Budget
from laconic.errors import LaconicError
from laconic.method import Method
from laconic.recipe import Recipe
from laconic.registry import find, methods

LOWEST, HIGHEST = 0.005, 0.8  # shares that may be kept; beyond the highest there is little to gain
START = 0.1
BASELINES = ("random",)


@dataclass(frozen=True)
class Entry:
    """A recipe to be tuned: a budget that it names, and a parameter that is not at its default, stay as they are."""

    recipe: Recipe

    @property
    def name(self) -> str:
        return str(self.recipe)

    @property
    def free(self) -> list[bool]:
        """Which of its methods get their budget from the search."""
        return [method.budget.is_full and method.takes_budget for method in self.recipe.methods]

    def choices(self) -> list[dict[str, tuple[Any, ...]]]:
        """For each method the parameters that are searched, with their values."""
        return [parameter_values(method) for method in self.recipe.methods]


class Space:
    """Recipes by the parameters of an optuna trial.

    ``budgets`` limits the search to these; without it every share between ``LOWEST`` and ``HIGHEST`` is tried, the same in
    all layers or falling from layer to layer.
    """

    def __init__(self, entries: Sequence[Recipe], budgets: Sequence[Budget] | None = None) -> None:
        self.entries = {entry.name: entry for entry in map(Entry, entries)}
        self.budgets = None if budgets is None else list(dict.fromkeys(map(str, budgets)))

    def suggest(self, trial: Any) -> Recipe:
        """The recipe of a trial. Raises LaconicError where parameters do not fit together."""
        entry = self.entries[trial.suggest_categorical("method", list(self.entries))]
        parts = []
        for i, (method, free, choices) in enumerate(zip(entry.recipe.methods, entry.free, entry.choices(), strict=True)):
            values = {name: trial.suggest_categorical(f"{entry.name}/{i}/{name}", choices[name]) for name in choices}
            budget = self._budget(trial, i) if free else method.budget
            parts.append((method, {**values, "budget": budget}))
        return Recipe(tuple(dataclasses.replace(method, **values) for method, values in parts))

    def _budget(self, trial: Any, part: int) -> Budget:
        if self.budgets is not None:
            return Budget.parse(trial.suggest_categorical(f"budget {part}", self.budgets))
        share = trial.suggest_float(f"budget {part}", LOWEST, HIGHEST, log=True)
        return readable(share, trial.suggest_categorical(f"shape {part}", SHAPES))

    def starts(self) -> list[dict[str, Any]]:
        """Parameters to begin with: every method at its defaults, at one share or at each of the given budgets."""
        sizes = [START] if self.budgets is None else self.budgets
        points = [self._start(entry, size) for size in sizes for entry in self.entries.values()]
        return [point for i, point in enumerate(points) if point not in points[:i]]

    def _start(self, entry: Entry, size: Any) -> dict[str, Any]:
        point: dict[str, Any] = {"method": entry.name}
        for i, (method, free, choices) in enumerate(zip(entry.recipe.methods, entry.free, entry.choices(), strict=True)):
            point |= {f"{entry.name}/{i}/{name}": getattr(method, name) for name in choices}
            if free:
                point[f"budget {i}"] = size
                point |= {f"shape {i}": "uniform"} if self.budgets is None else {}
        return point

    def cheaper(self, best: dict[str, Any], failed: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The parameters of the best recipe with one budget half way (in proportion) to what is known to be too small."""
        for name in (key for key in best if key.startswith("budget ") and self.budgets is None):
            rest = {key: value for key, value in best.items() if key != name}
            small = [p[name] for p in failed if {k: v for k, v in p.items() if k != name} == rest and p[name] < best[name]]
            share = math.sqrt(best[name] * max([LOWEST / 2, *small]))
            if share >= LOWEST and str(readable(share)) != str(readable(best[name])) and share < 0.93 * best[name]:
                return {**best, name: share}
        return None

    def larger(self, point: dict[str, Any]) -> dict[str, Any] | None:
        """The same parameters with all budgets half way (in proportion) to the highest; None where they are near it."""
        if self.budgets is not None:
            return None
        sizes = {key: math.sqrt(value * HIGHEST) for key, value in point.items() if key.startswith("budget ")}
        return {**point, **sizes} if any(size > 1.07 * point[key] for key, size in sizes.items()) else None


def readable(share: float, shape: str = "uniform") -> Budget:
    """A share of two digits: 4.3 %, 12 %."""
    return Budget(share=float(f"{share:.2g}"), shape=shape)


def parameter_values(method: Method) -> dict[str, tuple[Any, ...]]:
    """The parameters of a method that are searched, with the values to try, the present one first.

    What a parameter declares as ``search``, or else both of a bool, and half and double of a number (of one below 1: half
    way to 0 and to 1). Values that the method refuses are left out, and so are parameters that are set already.
    """
    found = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "budget" or value != field.default:
            continue
        declared = field.metadata.get("search")
        wanted = _around(value) if declared is None else declared
        values = [value, *(v for v in wanted if v != value and _accepts(method, field.name, v))]
        if len(values) > 1:
            found[field.name] = tuple(dict.fromkeys(values))
    return found


def _around(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value // 2, 2 * value)
    if isinstance(value, float):
        return (value / 2, (1 + value) / 2 if 0 < value < 1 else 2 * value)
    return ()


def _accepts(method: Method, name: str, value: Any) -> bool:
    try:
        dataclasses.replace(method, **{name: value})
    except LaconicError:
        return False
    return True


def choose_entries(chosen: Sequence[str | Method | Recipe] | str | Method | Recipe | None) -> list[Recipe]:
    """The recipes to be tuned: what is named, or every method that leaves tokens out and needs no training."""
    if chosen is None:
        rows = [row for row in methods() if {"evict", "read"} & set(row["verbs"]) and row["id"] not in BASELINES]
        return [Recipe((find(row["id"])(),)) for row in rows if row["needs"] != "training"]
    named = [chosen] if isinstance(chosen, (str, Method, Recipe)) else list(chosen)
    recipes = [recipe for entry in named if str(recipe := Recipe.parse(entry)) != "dense"]
    if not recipes:
        raise LaconicError("There is no method to tune: name one or more besides dense, or none to try them all.")
    return recipes
