"""The cheapest recipe that keeps the asked share of the dense quality, found on one half of the prompts, checked on the other."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laconic.budget import Budget
from laconic.errors import LaconicError, quote
from laconic.evaluation import measure
from laconic.evaluation.progress import Advance, progress_bar
from laconic.evaluation.provenance import identify, machine
from laconic.evaluation.results import ResultStore, dumps, prepare_directory, write_atomic
from laconic.evaluation.search import Search
from laconic.evaluation.search_space import Space, choose_entries
from laconic.evaluation.session import Interrupted, now
from laconic.evaluation.verdict import Verdict, check
from laconic.evaluation.workload import Work, check_options, default_task, open_model, open_work
from laconic.method import Method
from laconic.recipe import Recipe

COSTS = {"read": "bytes_read", "kept": "bytes_kept", "time": "decode_s"}
SAMPLES = 60  # prompts of a built-in task, both halves together
TRIALS = 40  # recipes tried, on top of one for every method
FEWEST = 4
RECIPE = "recipe.json"


@dataclass(frozen=True)
class TunedRecipe(Recipe):
    """A recipe as ``tune`` found it, and what is known of it.

    ``verdict``: what the held-out prompts say. ``path``: the recipe file. ``rows``: dense and the recipe on the held-out
    half, as rows of ``compare``. ``tried``: one row per recipe of the search, in order. ``run``: what was run, on what.
    """

    verdict: Verdict = field(kw_only=True, compare=False)
    path: Path = field(kw_only=True, compare=False)
    rows: list[dict[str, Any]] = field(kw_only=True, compare=False, repr=False)
    tried: list[dict[str, Any]] = field(kw_only=True, compare=False, repr=False)
    run: dict[str, Any] = field(kw_only=True, compare=False, repr=False)

    @property
    def holds(self) -> bool:
        """Whether the held-out prompts keep the asked share too."""
        return self.verdict.holds

    def as_dict(self) -> dict[str, Any]:
        """Everything, in JSON types."""
        return {
            "recipe": str(self),
            "file": str(self.path),
            "verdict": self.verdict.as_dict(),
            "run": self.run,
            "rows": self.rows,
            "tried": self.tried,
        }


def tune(
    model: str | tuple[Any, Any] = "needle",
    *,
    keep: float | str = 0.99,
    cost: str = "read",
    methods: Sequence[str | Method | Recipe] | str | None = None,
    budgets: Sequence[str | int | Budget] | str | None = None,
    trials: int | None = None,
    task: str | None = None,
    samples: int | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    question: str = "seen",
    max_new_tokens: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    output: str | Path = "laconic-tune",
    overwrite: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> TunedRecipe:
    """Searches methods, budgets and parameters for the cheapest recipe that keeps ``keep`` of the dense quality.

    Quality is the task's, or the fidelity where the task has no answers. The prompts are split into like halves: the search
    sees the first; the recipe that it finds is then measured once on the second, which gives the verdict. Dense wins where
    nothing cheaper is good enough.

    Args:
        keep: the share of the dense quality, 0.99 or "99%".
        cost: what is to be small: ``read`` (bytes read per decode step), ``kept`` (bytes of the cache), ``time`` (of a decode
            step).
        methods: names or recipes; by default every method that leaves tokens out. A budget or parameter that a recipe
            names is left as it is: "h2o + tokenselect" searches two budgets, "h2o:50% + tokenselect" one.
        budgets: the only budgets to try; by default all shares from 0.5% to 80%.
        trials: how many recipes are tried; by default 40 and one for every method.
        model, task, samples, lengths, seed, question, max_new_tokens, device, dtype: as in ``compare``.
        output: the directory of the run; ``recipe.json`` in it is what ``apply``, ``generate`` and ``Recipe.load`` take. A
            run that was interrupted goes on where it stopped, and one with more ``trials`` goes on from where it ended.

    Raises:
        LaconicError: for anything that the user can mend, in one sentence.
    """
    keep = parse_share(keep)
    if cost not in COSTS:
        raise LaconicError(f"cost is {quote(cost)}: use {', '.join(COSTS)}.")
    check_options(question=question, samples=samples, max_new_tokens=max_new_tokens)
    sizes = [budgets] if isinstance(budgets, (str, int, Budget)) else budgets
    entries = choose_entries(methods)
    space = Space(entries, None if sizes is None else [Budget.parse(size) for size in sizes])
    trials = TRIALS + len(entries) if trials is None else trials
    if trials < 1:
        raise LaconicError(f"trials is {trials}: give 1 or more, or leave it out.")
    directory = Path(output)
    prepare_directory(directory)
    network, tokenizer, model_id = open_model(model, device, dtype)
    task = task or default_task(tokenizer)
    count = SAMPLES if samples is None and not task.endswith((".jsonl", ".ndjson")) else samples
    work = open_work(
        task, tokenizer, samples=count, lengths=lengths, seed=seed, question=question, max_new_tokens=max_new_tokens
    )
    settings = {"seed": seed, "question": question, "max_new_tokens": max_new_tokens, "job": "tune", "keep": keep, "cost": cost}
    settings |= {"methods": list(space.entries), "budgets": space.budgets}
    identity = identify(network, model_id, work.task, work.items, settings)
    command = command or f"laconic.tune({model_id!r}, keep={keep}, task={task!r}, output={str(output)!r})"
    with ResultStore(directory, identity, overwrite=overwrite) as store:
        return _Tuning(network, tokenizer, space, work, store, command).run(trials, progress)


def parse_share(value: float | str) -> float:
    """``0.99`` or ``"99%"``."""
    match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]+)?)\s*(%?)\s*", str(value))
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise LaconicError(f"keep is {quote(value)}: give a share of the dense quality, such as 99% or 0.99.")
    return share


def split(items: Sequence[measure.Item], seed: int) -> tuple[list[measure.Item], list[measure.Item]]:
    """Two halves that are alike: of two neighbours by length, answered ones apart, one goes into each.

    Raises LaconicError where there are too few prompts to split.
    """
    if len(items) < FEWEST:
        raise LaconicError(
            f"The task has {len(items)} prompts: tune needs at least {FEWEST}, half to search and half to check (60 are better)."
        )
    rng = random.Random(f"tune/{seed}")
    order = sorted(items, key=lambda item: (item.example.answer is None, len(item.ids), rng.random()))
    halves: tuple[list[measure.Item], list[measure.Item]] = ([], [])
    for i in range(0, len(order), 2):
        pair = order[i : i + 2]
        rng.shuffle(pair)
        for half, item in zip(halves, pair, strict=False):
            half.append(item)
    for half in halves:
        rng.shuffle(half)  # a search that stops early has seen all lengths
    return halves


class _Tuning:
    """A search and its check, with everything they need."""

    def __init__(
        self, network: Any, tokenizer: Any, space: Space, work: Work, store: ResultStore, command: str
    ) -> None:
        self.space, self.work, self.store = space, work, store
        self.runner = measure.Runner(network, tokenizer)
        self.keep, self.cost = store.identity["keep"], COSTS[store.identity["cost"]]
        self.halves = dict(zip(("search", "held_out"), split(work.items, store.identity["seed"]), strict=True))
        self.dense = Recipe.parse("dense")
        identity = store.identity
        self.header: dict[str, Any] = {
            "command": command,
            "versions": identity["versions"],
            "machine": machine(self.runner.device),
            "model": {"id": identity["model"], "architecture": type(network).__name__, "dtype": identity["dtype"]},
            "task": {"name": work.task.name, "metric": work.metric, "examples": len(self.halves["held_out"])},
            "seed": identity["seed"],
            "question": identity["question"],
            "notes": [*work.notes, *store.problems],
            "started": store.started or now(),
            "finished": None,
        }

    def run(self, trials: int, progress: bool) -> TunedRecipe:
        """Searches, checks, and writes the recipe file."""
        self.store.write_header(self.header)
        network = self.runner.model
        training = network.training
        network.eval()
        try:
            with progress_bar(progress, self._tokens(trials), "dense") as advance:
                search = self._search(trials, advance)
                verdict, rows = self._check(search, advance)
        except KeyboardInterrupt:
            raise Interrupted(
                f"Interrupted: {len(self._trials())} tried recipes are kept in {self.store.directory}; "
                "run the same command again to go on."
            ) from None
        finally:
            network.train(training)
        self.header |= {"finished": now(), "notes": [*self.header["notes"], *search.notes]}
        self.store.write_header(self.header)
        return self._write(search, verdict, rows)

    def _trials(self) -> list[dict[str, Any]]:
        """The rows of the search that are on disk."""
        return [row for row in self.store.rows if "trial" in row]

    def _tokens(self, trials: int) -> int:
        """Tokens still to be run, for the progress bar: trials, the check, and dense for both."""
        costs = {name: sum(item.cost for item in half) for name, half in self.halves.items()}
        left = trials - len(self._trials())
        return (left + 1) * costs["search"] * (left > 0) + 2 * costs["held_out"] * (left > 0 or not self._checked())

    def _checked(self) -> bool:
        return any(row["half"] == "held_out" for row in self.store.rows)

    def _row(self, half: str, recipe: str) -> dict[str, Any] | None:
        return next((row for row in self.store.rows if row["half"] == half and row["recipe"] == recipe), None)

    def _search(self, trials: int, advance: Advance) -> Search:
        """Tries recipes on the search half, after those that are on disk."""
        known = self._trials()
        reference = self._row("search", "dense")
        if reference is None or len(known) < trials:
            fresh = self._measure(self.dense, "search", lambda tokens: advance("dense", tokens), full=False)
            reference = reference or self.store.append(fresh)
        if reference["quality_name"] not in (None, "perplexity") and not reference["quality"]:
            raise LaconicError(
                f"The dense model gets none of the {reference['examples']} prompts right, so there is no quality to keep: "
                "give a task that it can do, or one without answers."
            )
        search = Search(self.space, reference, keep=self.keep, cost=self.cost, seed=self.store.identity["seed"])
        for row in known:
            search.replay(row)
        while len(search.rows) < trials and (ask := search.ask()) is not None:
            self._try(search, ask, f"{len(search.rows) + 1}/{trials}", advance)
        if search.refused_all:
            raise LaconicError(search.refused_all)
        return search

    def _try(self, search: Search, ask: Any, number: str, advance: Advance) -> None:
        """One trial: measured until it is clear that the recipe keeps too little or costs too much."""
        names = {"trial": len(search.rows), "half": "search", "task": self.work.task.name, "params": ask.params}
        label, left = f"{number} {ask.recipe}"[:26], sum(item.cost for item in self.halves["search"])

        def passed(tokens: int) -> None:
            nonlocal left
            left -= tokens
            advance(label, tokens)

        try:
            if self.cost == "decode_s":
                measure.warm_up(self.runner, self.halves["search"][0], ask.recipe)
            row = search.judge(self._measure(ask.recipe, "search", passed, enough=ask.enough, full=False), ask)
        except LaconicError as error:
            row = search.refusal(str(error))
        advance(label, left)
        search.tell(ask, self.store.append({**row, "recipe": str(ask.recipe), **names}))

    def _check(self, search: Search, advance: Advance) -> tuple[Verdict, list[dict[str, Any]]]:
        """The best recipe and dense on the prompts that the search has not seen."""
        names = list(dict.fromkeys(("dense", str(search.recipe))))
        if any(self._row("held_out", name) is None for name in names):
            fresh = self._measure(self.dense, "held_out", lambda tokens: advance("check dense", tokens))
            if self._row("held_out", "dense") is None:  # else dense was run for what its row does not hold
                self.store.append(fresh)
        if self._row("held_out", names[-1]) is None:
            label = f"check {search.recipe}"[:26]
            self.store.append(self._measure(search.recipe, "held_out", lambda tokens: advance(label, tokens)))
        rows = [row for name in names if (row := self._row("held_out", name))]
        looks = sum(row["half"] == "held_out" and row["recipe"] != "dense" for row in self.store.rows)
        return check(rows[-1], rows[0], keep=self.keep, looks=looks, seed=self.store.identity["seed"]), rows

    def _measure(self, recipe: Recipe, half: str, advance: Any, *, full: bool = True, enough: Any = None) -> dict[str, Any]:
        costs: list[float] = []

        def watch(sofar: dict[str, Any]) -> bool:
            costs.append(sofar[self.cost])
            return enough is not None and enough(sofar, costs)

        items, metric = self.halves[half], self.work.metric
        row = measure.measure_cell(self.runner, items, metric, recipe, advance, None if full else watch)
        name = "dense" if recipe == self.dense else str(recipe)
        names = {"method": name, "recipe": str(recipe), "budget": str(recipe.methods[-1].budget)}
        return {**row, **names, "half": half, "costs": costs, "task": self.work.task.name}

    def _write(self, search: Search, verdict: Verdict, rows: list[dict[str, Any]]) -> TunedRecipe:
        path = self.store.directory / RECIPE
        tuned = {
            "keep": self.keep,
            "cost": self.store.identity["cost"],
            "model": self.store.identity["model"],
            "task": self.work.task.name,
            "command": self.header["command"],
            "tried": len(search.rows),
            **verdict.as_dict(),
        }
        write_atomic(path, dumps({"recipe": search.recipe.parts(), "tuned": tuned}, indent=2) + "\n")
        run = {**self.header, "keep": self.keep, "cost": self.cost}
        return TunedRecipe(search.recipe.methods, verdict=verdict, path=path, rows=rows, tried=search.rows, run=run)
