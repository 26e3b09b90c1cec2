"""Draws what ``laconic bench scoring_pareto --json`` found: ``python benchmarks/scoring_front.py FILE --output docs/images``.

One SVG with a panel per case: recall of the best tokens' attention over bytes read per step; published searches are named. A
Markdown table of them, and of what beats each, on stdout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from drawing import save, subplots


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """One figure: a panel per case."""
    figure, axes = subplots(1, len(cases), figsize=(4.2 * len(cases), 4.2), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        dense = case["dense_bytes"]
        ours = [row for row in case["rows"] if not row["known"]]
        front = sorted((row["bytes"] / dense, row["recall"]) for row in case["rows"] if row["front"])
        axis.step(*zip(*front, strict=True), where="post", color="0.8", linewidth=5, label="front")
        axis.scatter([r["bytes"] / dense for r in ours], [r["recall"] for r in ours], s=14, label="coarse_to_fine")
        for row in (row for row in case["rows"] if row["known"]):
            axis.scatter([row["bytes"] / dense], [row["recall"]], marker="D", s=30, color="tab:red")
            axis.annotate(row["known"], (row["bytes"] / dense, row["recall"]), xytext=(5, -9), textcoords="offset points")
        axis.set(xscale="log", xlabel="bytes read per step, share of dense", title=case["case"].replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("recall of the best tokens' attention")
    axes[0][0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    save(figure, path)


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown: a line per case and published search."""
    lines = ["| case | published | recall | read | found by | recall | read |", "|---|---|---|---|---|---|---|"]
    for case in cases:
        rows = {row["recipe"]: row for row in case["rows"]}
        for row in (row for row in case["rows"] if row["known"]):
            better = rows.get(case["beaten_by"][row["known"]])
            cells = [f"{part['recall']:.3f} | {part['bytes'] / case['dense_bytes']:.3f}" for part in (row, better) if part]
            name = f"`{better['recipe'].rsplit(':', 1)[0]}` | {cells[1]}" if better else "nothing here | – | –"
            lines.append(f"| {case['case'].replace('_', ' ')} | `{row['known']}` | {cells[0]} | {name} |")
    return "\n".join(lines)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    cases = json.loads(arguments.file.read_text())["detail"]["cases"]
    draw(cases, arguments.output / "scoring-front.svg")
    print(table(cases))


if __name__ == "__main__":
    main()
