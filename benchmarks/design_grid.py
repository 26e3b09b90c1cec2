"""Every score with every selection on equal terms: ``python benchmarks/design_grid.py --output REPORT_DIR > grid.json``.

Runs the method ``design`` on shapes_vqa with each score and each selection at 33, 11.1 and 5.6 % of a picture's tokens, random
and even choices beside them, and prints the share of right answers with its 95 % interval (Wilson) and the papers in a cell.
The report directory holds the single answers; a stopped run goes on. ``--figure FILE.svg`` draws the grid (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from drawing import save, subplots

import laconic

SCORES = ("salience", "received", "novelty", "norm", "text")
SELECTIONS = ("best", "unlike", "relevant", "different", "covering", "determinant")
BLIND = ("random", "even", "farthest", "covering", "determinant")  # selections that work without a score
BUDGETS = ("33%", "11.1%", "5.6%")
PAPERS = {
    ("salience", "best"): "VTC-CLS, FasterVLM (2024)", ("salience", "unlike"): "ToDRE (2025)",
    ("salience", "relevant"): "IDPruner (2026)", ("salience", "covering"): "SCOPE (2025)",
    ("text", "determinant"): "CDPruner (2025)",
    ("none", "farthest"): "DivPrune (2025)", ("none", "random"): "baseline", ("none", "even"): "baseline",
    ("none", "covering"): "MMTok without words (2025)",
}  # fmt: skip


def main() -> None:
    """Measures what is missing and prints the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--output", type=Path, default=Path("design-grid"), help="the comparison's directory")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    cells = [(score, select) for score in SCORES for select in SELECTIONS] + [("none", select) for select in BLIND]
    methods = [f"design(score={score}, select={select})" for score, select in cells]
    report = laconic.compare(
        options.model, methods=methods, budgets=BUDGETS, task="shapes_vqa", samples=options.samples, output=options.output
    )
    grid = gather(report.rows)
    dense = next(row for row in report.rows if row["method"] == "dense")
    header = {name: report.run[name] for name in ("model", "machine", "versions")}
    print(json.dumps({"dense": dense["quality"], "samples": options.samples, "cells": grid, **header}, indent=2))
    if options.figure:
        draw(grid, dense["quality"], options.figure)


def gather(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict per cell and budget."""
    found = []
    for row in rows:
        (method,) = laconic.Recipe.parse(row["recipe"]).methods
        if method.id != "design":
            continue
        score, select = method.score, method.select
        right = [cell["correct"] for cell in row["cells"]]
        low, high = wilson(sum(right), len(right))
        kinds: dict[str, list[float]] = {}
        for cell in row["cells"]:
            kinds.setdefault(cell["meta"]["type"], []).append(cell["correct"])
        found.append(
            {
                "score": score, "select": select, "budget": row["budget"], "right": row["quality"], "low": low, "high": high,
                "kinds": {kind: sum(values) / len(values) for kind, values in kinds.items()},
                "paper": PAPERS.get((score, select)),
            }
        )  # fmt: skip
    return found


def wilson(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927)."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return middle - half, middle + half


def draw(grid: list[dict[str, Any]], dense: float, path: Path) -> None:
    """A heat map per budget: scores down, selections across."""
    rows, columns = [*SCORES, "none"], [*SELECTIONS, *(s for s in BLIND if s not in SELECTIONS)]
    figure, axes = subplots(1, len(BUDGETS), figsize=(15, 4.6), sharey=True)
    for axis, budget in zip(axes, BUDGETS, strict=True):
        table = [[float("nan")] * len(columns) for _ in rows]
        for cell in grid:
            if cell["budget"] == budget:
                table[rows.index(cell["score"])][columns.index(cell["select"])] = cell["right"]
        axis.imshow(table, cmap="viridis", vmin=0, vmax=dense, aspect="auto")
        for i, line in enumerate(table):
            for j, value in enumerate(line):
                if not math.isnan(value):
                    colour = "black" if value > 0.6 * dense else "white"
                    axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(f"{budget} of the tokens")
    figure.suptitle(f"Right answers in per cent; dense {100 * dense:.0f}")
    figure.tight_layout()
    save(figure, path)


if __name__ == "__main__":
    main()
