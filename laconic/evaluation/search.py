"""The search of ``laconic tune``: which recipe is tried next, and when a trial has shown enough."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from laconic.errors import LaconicError
from laconic.evaluation.quality import Pairs
from laconic.evaluation.search_space import Space
from laconic.recipe import Recipe

ATTEMPTS = 50  # to find a recipe that was not tried yet
LOOK = 3  # prompts before a recipe is given up for its cost
MARGIN = 0.05  # by how much it must then be dearer than the best one on the same prompts
ROUNDING = 1e-9


@dataclass
class Ask:
    """A recipe to be tried. ``stopped``: why it was given up ("quality" or "cost"), or None."""

    search: Search
    trial: Any
    params: dict[str, Any]
    recipe: Recipe
    stopped: str | None = field(default=None, init=False)

    def enough(self, sofar: dict[str, Any], costs: Sequence[float | None]) -> bool:
        """Whether the prompts so far have shown that the recipe keeps too little, or costs more than the best one.

        It keeps too little when even dense answers on all other prompts would not save it.
        """
        search, count = self.search, len(costs)
        if count == len(search.reference["cells"]):
            return False
        if Pairs.of(sofar["cells"], search.reference["cells"]).at_best < search.keep - ROUNDING:
            self.stopped = "quality"
        elif count >= LOOK and _dearer(costs[-1], search.best["costs"][count - 1]):
            self.stopped = "cost"
        return self.stopped is not None


def _dearer(cost: float | None, best: float | None) -> bool:
    return cost is not None and best is not None and cost > best * (1 + MARGIN)


class Search:
    """An optuna study of one number, the cost, under one constraint, the quality.

    First every method is tried at its defaults. Then two proposals take turns: the best recipe with a smaller budget, by
    bisection (or, until one is good enough, the nearest to it with a larger budget), and whatever a tree-structured Parzen
    estimator expects much of. Every proposal follows from the seed and from
    what was told before, so that a search which is continued from its rows is the one that was not interrupted.
    """

    def __init__(self, space: Space, reference: dict[str, Any], *, keep: float, cost: str, seed: int) -> None:
        import optuna

        if not reference[cost]:
            raise LaconicError("No prompt has a decode step, so nothing is read: let answers be longer than one token.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.reference, self.keep, self.cost, self.seed = space, reference, keep, cost, seed
        self.study = optuna.create_study(direction="minimize")
        self.rows: list[dict[str, Any]] = []
        self.best = reference
        self.recipe = Recipe.parse("dense")
        self._starts = space.starts()
        self._asked: list[dict[str, Any]] = []
        self._known: set[str] = set()

    def ask(self) -> Ask | None:
        """The next recipe, which was not tried before; None when there seems to be none."""
        from optuna.trial import TrialState

        for attempt in range(ATTEMPTS):
            ask = self._ask(self._point(attempt), attempt)
            if ask is not None and str(ask.recipe) not in self._known:
                return ask
            self.study.tell(self.study.trials[-1].number, state=TrialState.FAIL)  # not looked at by the estimator
        return None

    def tell(self, ask: Ask, row: dict[str, Any]) -> None:
        """Takes the row of a trial into account."""
        ask.trial.set_constraint("quality", self.keep - row["kept_quality"])
        self.study.tell(ask.trial, row["cost"] / self.reference[self.cost])
        self.rows.append(row)
        self._known.add(str(ask.recipe))
        self._asked.append(ask.params)
        if self.good(row) and row["cost"] < self.best[self.cost]:
            self.best, self.recipe = row, ask.recipe

    def replay(self, row: dict[str, Any]) -> None:
        """Tells the row of an earlier run."""
        ask = self._ask(row["params"], 0)
        if ask is None:
            raise LaconicError(f"{row['recipe']} in results.jsonl cannot be made any more: start afresh with --overwrite.")
        self.tell(ask, row)

    def judge(self, measured: dict[str, Any], ask: Ask) -> dict[str, Any]:
        """The row of a trial: what was measured, and what it says of quality and cost on all prompts."""
        cells, costs = measured.pop("cells"), measured["costs"]
        pairs = Pairs.of(cells, self.reference["cells"])
        cost = measured[self.cost]
        if ask.stopped and costs[-1] and self.reference["costs"][len(costs) - 1]:
            cost = self.reference[self.cost] * costs[-1] / self.reference["costs"][len(costs) - 1]
        kept = pairs.guess if ask.stopped == "quality" else pairs.share
        cost = self.reference[self.cost] if cost is None else cost
        return {**measured, "kept_quality": kept, "cost": cost, "stopped": ask.stopped, "reason": None}

    def refusal(self, reason: str) -> dict[str, Any]:
        """The row of a recipe that cannot run."""
        return {"kept_quality": 0.0, "cost": self.reference[self.cost], "stopped": "refused", "reason": reason}

    def good(self, row: dict[str, Any]) -> bool:
        """Whether a trial went to its end and kept the asked share."""
        return row["stopped"] is None and row["kept_quality"] >= self.keep - ROUNDING

    @property
    def notes(self) -> list[str]:
        """One sentence for every entry of the search that could never run."""
        ran = {row["params"]["method"] for row in self.rows if row["stopped"] != "refused"}
        reasons = {row["params"]["method"]: row["reason"] for row in self.rows if row["stopped"] == "refused"}
        return [f"{name} was left out: {reason}" for name, reason in reasons.items() if name not in ran]

    @property
    def refused_all(self) -> str | None:
        """The first reason, where no recipe at all could run."""
        reasons = [row["reason"] for row in self.rows]
        return reasons[0] if reasons and all(row["stopped"] == "refused" for row in self.rows) else None

    def _point(self, attempt: int) -> dict[str, Any] | None:
        """The parameters to try next, or None to leave them to the estimator."""
        start = next((point for point in self._starts if point not in self._asked), None)
        if start is not None:
            self._asked.append(start)
            return start
        if attempt or len(self.rows) % 2:
            return None
        failed = [row for row in self.rows if row["stopped"] != "cost" and not self.good(row)]
        if self.best is self.reference:
            near = max(failed, key=lambda row: row["kept_quality"], default=None)
            return None if near is None else self.space.larger(near["params"])
        return self.space.cheaper(self.best["params"], [row["params"] for row in failed])

    def _ask(self, point: dict[str, Any] | None, attempt: int) -> Ask | None:
        """A trial at ``point``, or at what the estimator proposes; None where its parameters do not fit together."""
        from optuna.samplers import TPESampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that groups of parameters are experimental
            number = (self.seed * 1_000_003 + len(self.rows) * ATTEMPTS + attempt) % (1 << 32)
            self.study.sampler = TPESampler(
                seed=number, multivariate=True, group=True, n_startup_trials=max(1, len(self._starts))
            )
            if point is not None:
                self.study.enqueue_trial(point)
            trial = self.study.ask()
            try:
                recipe = self.space.suggest(trial)
            except LaconicError:
                return None
        return Ask(self, trial, dict(trial.params), recipe)
