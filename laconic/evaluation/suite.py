"""Suites of ``laconic compare --suite``: the claims of methods, measured (cards); what drafting gains (decoding)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.claims import Claim
from laconic.errors import LaconicError
from laconic.evaluation.compare import compare
from laconic.evaluation.decoding_suite import decoding_suite
from laconic.evaluation.results import dumps, write_atomic
from laconic.method import Method
from laconic.recipe import Recipe
from laconic.registry import find, methods

SUITES = ("cards", "decoding")
MODELS = {"cards": "needle", "decoding": "story"}  # where none is named


def run_suite(
    suite: str = "cards",
    names: Sequence[str] | None = None,
    *,
    model: Any = None,
    output: str | Path = "laconic-report",
    samples: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """``cards``: measures every claim of the named methods (by default of all that are not about pictures), says which hold.

    Claims that share a task are measured in one comparison, in a directory of its own below ``output``; what was
    measured before is not measured again. ``samples`` overrides the claims' own number of examples. By default the model is
    the built-in one that a suite is made for. ``decoding`` gives the rows of ``decoding_suite``, which has more options.

    Returns:
        One row per claim: method, claim (a sentence), figure, value, rival, rival_value, budget, task, examples, holds.
        The same rows are in ``output/outcomes.jsonl``.
    """
    if suite not in SUITES:
        raise LaconicError(f"There is no suite '{suite}': use {' or '.join(SUITES)}.")
    if suite == "decoding":
        options: dict[str, Any] = {"samples": samples, "output": output, "overwrite": overwrite, "progress": progress}
        return decoding_suite(model or MODELS[suite], methods=names, **options).rows
    model = model or MODELS[suite]
    chosen = [find(name) for name in names] if names else [find(row["id"]) for row in methods() if row["stage"] != "vision"]
    todo = [(method, claim) for method in chosen for claim in method.claims]
    if not todo:
        raise LaconicError(f"{', '.join(m.id for m in chosen)} makes no claim that could be measured: name other methods.")
    rows: list[dict[str, Any]] = []
    for number, setting in enumerate(dict.fromkeys(claim.setting for _, claim in todo)):
        group = [(method, claim) for method, claim in todo if claim.setting == setting]
        task, lengths, count, question = setting
        recipes = list(dict.fromkeys(recipe for method, claim in group for recipe in _recipes(method, claim)))
        report = compare(
            model,
            methods=recipes,
            task=task,
            lengths=lengths or None,
            samples=samples or count,
            question=question,
            output=Path(output) / f"{number}-{task}-{'-'.join(map(str, lengths))}-{question}",
            overwrite=overwrite,
            progress=progress,
        )
        found = {row["recipe"]: row for row in report.rows}
        skipped = {entry["recipe"]: entry["reason"] for entry in report.run["skipped"]}
        rows += [_outcome(method, claim, found, skipped) for method, claim in group]
    write_atomic(Path(output) / "outcomes.jsonl", "".join(dumps(row) + "\n" for row in rows))
    return rows


def _recipes(method: type[Method], claim: Claim) -> tuple[str, str]:
    """The two recipes that a claim compares, as ``compare`` writes them."""
    rival = claim.rival if claim.rival == "dense" or ":" in claim.rival else f"{claim.rival}:{claim.budget}"
    return str(Recipe.parse(f"{method.id}:{claim.budget}")), str(Recipe.parse(rival))


def _outcome(
    method: type[Method], claim: Claim, found: dict[str, dict[str, Any]], skipped: dict[str, str]
) -> dict[str, Any]:
    mine, other = _recipes(method, claim)
    values = [found.get(recipe, {}).get(claim.figure) for recipe in (mine, other)]
    row = {
        "method": method.id,
        "claim": str(claim),
        "figure": claim.figure,
        "value": values[0],
        "rival": claim.rival,
        "rival_value": values[1],
        "budget": claim.budget,
        "task": claim.task,
        "examples": found["dense"]["examples"],
        "holds": claim.holds(*values),
    }
    reasons = [skipped[recipe] for recipe in (mine, other) if recipe in skipped]
    return {**row, "skipped": reasons[0]} if reasons else row


def outcome_table(rows: list[dict[str, Any]]) -> Any:
    """A rich table: one line per claim."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("method", "claim", "measured", "rival", ""):
        table.add_column(heading)
    for row in rows:
        numbers = ["–" if row[key] is None else f"{row[key]:.3g}" for key in ("value", "rival_value")]
        table.add_row(row["method"], row["claim"], *numbers, "holds" if row["holds"] else "does not hold")
    return table
