"""Writes what was measured of drafting into the documentation, between the marks that are there for it.

    laconic compare --suite decoding --output laconic-report
    python benchmarks/decoding.py --output decoding.json
    python benchmarks/decoding_tables.py docs/decoding.md --suite laconic-report --bench decoding.json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.errors import LaconicError
from laconic.evaluation.decoding_report import all_exact
from laconic.evaluation.report import percent, read_header
from laconic.evaluation.results import HEADER, RESULTS, read_rows, write_atomic
from laconic.evaluation.table import size

Rows = Sequence[dict[str, Any]]


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def times(value: float | None, digits: int = 2) -> str:
    """A ratio; below 1 in bold, for it fell short."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}x"
    return text if value >= 1 else f"**{text}**"


def suite_table(directory: Path) -> str:
    """Tokens per forward and speed against plain decoding, workloads side by side."""
    rows, _ = read_rows(directory / RESULTS)
    if not rows:
        raise LaconicError(f"There are no results in {directory}: run laconic compare --suite decoding first.")
    run = read_header(directory / HEADER)
    texts = list(dict.fromkeys(row["task"] for row in rows))
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["temperature"], row["batch"], row["recipe"]), {})[row["task"]] = row
    lines = []
    for (temperature, batch, recipe), own in groups.items():
        cells = []
        for text in texts:
            row = own.get(text)
            each = row and row["tokens_per_forward"]
            cells.append("–" if not each else f"{each:.2f}, {times(row['speedup'])}")
        shares = [row["draft_share"] for row in own.values() if row["draft_share"] is not None]
        share = percent(statistics.mean(shares)) if shares else "–"
        memory = size(max(row["draft_bytes"] for row in own.values()))
        lines.append([f"`{recipe}`", f"{temperature:g}", str(batch), *cells, share, memory, all_exact(list(own.values()))])
    machine = (run.get("machine") or {}).get("device", "a processor")
    table = markdown(["method", "T", "batch", *texts, "drafting", "memory", "exact"], lines)
    return f"Tokens per forward, and plain decoding's time over its own; {machine}.\n\n{table}"


def peers_table(bench: dict[str, Any]) -> str:
    """Ours beside theirs, the workloads' median."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in bench["pairs"]:
        groups.setdefault((row["theirs"], row["ours"], row["temperature"], row["batch"]), []).append(row)
    lines = []
    for (theirs, ours, temperature, batch), rows in groups.items():
        cells = [f"theirs: {rows[0]['error']}", "–"]
        if rows[0]["ratio"] is not None:
            cells = [times(statistics.median(row[name] for row in rows)) for name in ("ratio", "cpu_ratio")]
        lines.append([theirs, f"`{ours}`", f"{temperature:g}", str(batch), *cells])
    return markdown(["transformers", "ours", "T", "batch", "time", "processor time"], lines)


def replay_table(bench: dict[str, Any]) -> str:
    """Tokens per forward and speed against plain decoding, where every forward pays that of a larger model."""
    rows = [row for row in bench["replay"] if "error" not in row and row["name"] != "dense"]
    texts = list(dict.fromkeys(row["workload"] for row in rows))
    found = {(row["name"], row["workload"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [found.get((name, text)) for text in texts]
        cells = [f"{row['tokens_per_forward']:.2f}, {times(row['against_plain'])}" if row else "–" for row in own]
        lines.append([f"`{name}`", *cells])
    table = markdown(["method", *texts], lines)
    if not bench.get("costs"):
        return table
    cost = bench["costs"][-1]["of_one"]
    beside = ", ".join(f"{nodes} tokens {ratio:.1f}" for nodes, ratio in cost.items() if nodes != "1")
    return f"{table}\n\nA forward of the slice, one token being 1: {beside}."


def fill(text: str, name: str, table: str) -> str:
    """The text with a table between the marks of that name."""
    pattern = re.compile(rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)", re.S)
    if not pattern.search(text):
        raise LaconicError(f"There is no place for '{name}' in it: put <!-- {name}: begin --> and <!-- {name}: end --> there.")
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--suite", type=Path, help="the directory of laconic compare --suite decoding")
    parser.add_argument("--bench", type=Path, help="the file of benchmarks/decoding.py")
    given = parser.parse_args(arguments)
    text = given.page.read_text(encoding="utf-8")
    if given.suite is not None:
        text = fill(text, "suite", suite_table(given.suite))
    if given.bench is not None:
        bench = json.loads(given.bench.read_text(encoding="utf-8"))
        text = fill(text, "peers", peers_table(bench)) if "pairs" in bench else text
        text = fill(text, "replay", replay_table(bench)) if "replay" in bench else text
    write_atomic(given.page, text)


if __name__ == "__main__":
    main()
