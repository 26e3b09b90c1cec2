"""The page and the table of ``laconic compare --suite decoding``: tokens per forward, time, accepted drafts, exactness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.evaluation.report import (
    STYLES,
    Row,
    entries_of,
    facts_of,
    fill,
    names_of,
    percent,
    styles_of,
    write_page,
)  # fmt: skip
from laconic.evaluation.table import figure, ratio, seconds, size

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS_OF_HISTOGRAM = 8  # accepted tokens that are told apart


def exactness(row: Row) -> str:
    """Whether greedy texts are those of plain decoding; nothing where they were drawn."""
    if row.get("exact") is None:
        return "–"
    return "yes" if row["exact"] else f"{row['equal']} of {row['texts']}"


# key, heading, meaning, how a row is shown
COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("tokens/forward", "new tokens of a text per forward of the model", lambda row: figure(row["tokens_per_forward"])),
    ("forwards", "after the prompt's, of all texts; a batch has its forwards together", lambda row: str(row["forwards"])),
    ("drafted", "nodes of the tree per forward, the root included", lambda row: figure(row["nodes_per_forward"])),
    ("time/token", "per new token, the prompt's forward apart", lambda row: seconds(row["decode_s"])),
    ("plain", "the same without drafts, in turns", lambda row: seconds(row["plain_s"])),
    ("faster", "plain time over time", lambda row: faster(row)),
    ("drafting", "share of the time spent on proposing and learning", lambda row: percent(row["draft_share"])),
    ("memory", "of the drafter: tables, or a draft model's weights and cache", lambda row: size(row["draft_bytes"])),
    ("exact", "greedy texts that equal those of plain decoding", exactness),
    ("guarantee", "against the same recipe without drafts", lambda row: row["guarantee"]),
)


def faster(row: Row) -> str:
    """Plain time over time as ``×1.8``."""
    return ratio(row["plain_s"], row["decode_s"]) or "–"


def write_decoding_report(directory: str | Path) -> Path:
    """Writes ``index.html`` from the results in ``directory``, in one step, and returns its path.

    Raises:
        LaconicError: there are no results in it, or the page cannot be written.
    """
    command = "laconic compare --suite decoding"
    return write_page(Path(directory), command, lambda *found: fill("decoding.html.j2", _view(*found)))


def _view(rows: list[Row], run: dict[str, Any], problems: Sequence[str]) -> dict[str, Any]:
    """Everything that the template shows."""
    styles = styles_of([row["method"] for row in rows])
    sections = {
        name: {"name": name, "style": str(int(style) % STYLES), "anchor": f"method-{number}", "entries": entries_of(name)}
        for number, (name, style) in enumerate(styles.items())
    }
    workloads = list(dict.fromkeys(row["task"] for row in rows))
    longest = min(COLUMNS_OF_HISTOGRAM, max(len(row["accepted"]) for row in rows)) - 1
    return {
        "facts": facts_of(rows, run, None),
        "command": run.get("command"),
        "names": names_of(rows, run),
        "notes": [*run.get("notes", []), *problems],
        "skipped": run.get("skipped", []),
        "unfinished": bool(run) and not run.get("finished"),
        "verdict": _verdict(rows, workloads),
        "workloads": workloads,
        "longest": longest,
        "panels": _panels(rows, workloads, sections, longest),
        "most_tokens": max(1.0, *(row["tokens_per_forward"] or 0 for row in rows)),
        "most_time": max(1.0, *(_time(row) or 0 for row in rows)),
        "columns": [{"name": name, "help": text} for name, text, _ in COLUMNS],
        "lines": [
            {"row": row, "section": sections[row["method"]], "cells": [show(row) for _, _, show in COLUMNS]} for row in rows
        ],
        "sections": list(sections.values()),
    }


def _time(row: Row) -> float | None:
    """Time per token over that of plain decoding."""
    return row["decode_s"] / row["plain_s"] if row["decode_s"] and row["plain_s"] else None


def _setting(row: Row) -> tuple[float, int]:
    return row["temperature"], row["batch"]


def _title(setting: tuple[float, int]) -> str:
    return f"temperature {setting[0]:g}, batch {setting[1]}"


def _verdict(rows: list[Row], workloads: Sequence[str]) -> dict[str, Any]:
    """For each workload the fastest that is not lossy, in the first setting."""
    setting = _setting(rows[0])
    choices = []
    for workload in workloads:
        able = [row for row in rows if row["task"] == workload and _setting(row) == setting and row["guarantee"] != "lossy"]
        best = min((row for row in able if _time(row) is not None), key=_time, default=None)
        best = best if best is not None and _time(best) < 1 else None
        choices.append({"workload": workload, "row": best, "faster": faster(best) if best else ""})
    return {"setting": _title(setting), "choices": choices}


def _panels(
    rows: list[Row], workloads: Sequence[str], sections: dict[str, dict[str, Any]], longest: int
) -> list[dict[str, Any]]:
    """One for each temperature and batch size: a line for each recipe, a cell for each workload."""
    panels = []
    for setting in dict.fromkeys(map(_setting, rows)):
        own = [row for row in rows if _setting(row) == setting]
        lines = []
        for recipe in dict.fromkeys(row["recipe"] for row in own):
            found = {row["task"]: _cell(row, longest) for row in own if row["recipe"] == recipe}
            first = next(row for row in own if row["recipe"] == recipe)
            cells = [found.get(workload) for workload in workloads]
            lines.append({"section": sections[first["method"]], "budget": first["budget"], "cells": cells})
        panels.append({"title": _title(setting), "lines": lines})
    return panels


def _cell(row: Row, longest: int) -> dict[str, Any]:
    counts = [*row["accepted"][:longest], sum(row["accepted"][longest:])]
    total = sum(counts) or 1
    shares = [count / total for count in counts]
    return {
        "tokens_per_forward": row["tokens_per_forward"],
        "time": _time(row),
        "histogram": shares if row["accepted"] else [],
        "tallest": max(shares, default=1.0) or 1.0,
    }


def build_table(rows: list[Row]) -> Table:
    """A rich table of at most 120 columns: a line for each recipe, temperature and batch size, workloads side by side."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    workloads = list(dict.fromkeys(row["task"] for row in rows))
    title = "tokens per forward and time against plain decoding (×2: twice as fast)"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.show_edge = table.pad_edge = False
    table.add_column("method", overflow="fold", min_width=10)
    for name in (" drafts", " T", " batch", *(f" {name[:10]}" for name in workloads), " drafting", " memory", " exact"):
        table.add_column(name, justify="right", no_wrap=True)
    order = dict.fromkeys((*_setting(row), row["recipe"]) for row in rows)
    last = None
    for temperature, batch, recipe in order:
        if last not in (None, (temperature, batch)):
            table.add_section()
        last = (temperature, batch)
        own = {row["task"]: row for row in rows if (*_setting(row), row["recipe"]) == (temperature, batch, recipe)}
        first = next(iter(own.values()))
        cells = [f" {figure(row['tokens_per_forward'])} {faster(row):>5}" if (row := own.get(w)) else " –" for w in workloads]
        share = [row["draft_share"] for row in own.values() if row["draft_share"] is not None]
        table.add_row(
            escape(first["method"]), first["budget"], f"{temperature:g}", str(batch), *cells,
            percent(sum(share) / len(share) if share else None), f" {size(max(row['draft_bytes'] for row in own.values()))}",
            f" {all_exact(list(own.values()))}",
        )  # fmt: skip
    return table


def all_exact(rows: list[Row]) -> str:
    """Over the workloads; where texts were drawn, the guarantee."""
    if any(row["exact"] is None for row in rows):
        return rows[0]["guarantee"]
    equal, texts = sum(row["equal"] for row in rows), sum(row["texts"] for row in rows)
    return "yes" if equal == texts else f"{equal} of {texts}"
