"""Draws quality over cost from finished comparisons: ``python benchmarks/fronts.py REPORT_DIR... --output docs/images``.

For every directory that ``laconic compare --output DIR`` wrote, one SVG with a panel per cost (bytes read per step, bytes
kept), a line per method over its budgets, and the Pareto front; and a Markdown table on stdout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from drawing import save, subplots

COSTS = (("bytes_read", "bytes read per step"), ("bytes_kept", "bytes kept"))


def load(directory: Path) -> tuple[list[dict], dict]:
    """Rows and header of a report."""
    rows = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    return rows, json.loads((directory / "run.json").read_text())


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both: less cost, more quality."""
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def draw(rows: list[dict], title: str, path: Path) -> None:
    """One figure: a panel per cost, relative to dense."""
    from matplotlib import colormaps

    dense = next(row for row in rows if row["method"] == "dense")
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    colours = colormaps["tab20"].colors
    figure, axes = subplots(1, len(COSTS), figsize=(12, 5.2), sharey=True)
    for axis, (cost, label) in zip(axes, COSTS, strict=True):
        points = [(row[cost] / dense[cost], row["quality"]) for row in rows]
        front = pareto(points)
        axis.step([x for x, _ in front], [y for _, y in front], where="post", color="0.8", linewidth=6, label="Pareto front")
        for i, name in enumerate(names):
            own = sorted((row[cost] / dense[cost], row["quality"]) for row in rows if row["method"] == name)
            style = {"marker": "os^Dv"[i % 5], "markersize": 4, "color": colours[i % 20], "linewidth": 1}
            axis.plot(*zip(*own, strict=True), label=name, **style)
        axis.scatter([1.0], [dense["quality"]], marker="*", color="black", zorder=5, label="dense")
        axis.set(xscale="log", xlabel=f"{label}, share of dense")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of right answers")
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", frameon=False)
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    save(figure, path)


def table(rows: list[dict]) -> str:
    """Markdown: a line per method, quality at each budget, and cost at the smallest."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["method"] != "dense"))
    dense = next(row for row in rows if row["method"] == "dense")
    lines = ["| method | " + " | ".join(f"right at {b}" for b in budgets) + f" | fidelity at {budgets[0]} | kept | read |",
             "|---" * (len(budgets) + 4) + "|"]  # fmt: skip
    for name in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        own = {row["budget"]: row for row in rows if row["method"] == name}
        first = own.get(budgets[0])
        cells = [f"{own[b]['quality']:.0%}" if b in own else "–" for b in budgets]
        costs = [f"{first[c] / dense[c]:.2f}" if first else "–" for c in ("bytes_kept", "bytes_read")]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {first['fidelity']:.2f} | {costs[0]} | {costs[1]} |" if first
                     else f"| `{name}` | {' | '.join(cells)} | – | – | – |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    for directory in arguments.reports:
        rows, run = load(directory)
        title = f"{run['model']['id']} on {run['task']['name']}, {run['task']['examples']} examples ({directory.name})"
        draw(rows, title, arguments.output / f"front-{directory.name}.svg")
        print(f"\n## {title}\n\n`{run['command']}`\n\n{table(rows)}")


if __name__ == "__main__":
    main()
