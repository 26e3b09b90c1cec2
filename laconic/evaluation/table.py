"""The table that ``laconic compare`` prints: one line per cell, each figure with its ratio to dense."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from laconic.evaluation.blocks import lowest, sparkline

if TYPE_CHECKING:
    from rich.table import Table


def size(count: float | None) -> str:
    """Bytes for people: 1.4 MB (powers of 1000)."""
    if count is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale * 0.9995:
            return f"{_three(count / scale)} {unit}"
    return f"{count:.0f} B"


def seconds(value: float | None) -> str:
    """Seconds for people: 12.3 ms."""
    if value is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale * 0.9995:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 1e-6)} µs"


def figure(value: float | None) -> str:
    """A quality or fidelity with two digits, large perplexities with fewer."""
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def ratio(value: float | None, dense: float | None) -> str:
    """Value / dense as ``×0.05``; nothing where that has no meaning."""
    if value is None or not dense:
        return ""
    quotient = value / dense
    return f"×{quotient:.0f}" if quotient >= 99.5 else f"×{quotient:.1f}" if quotient >= 9.95 else f"×{quotient:.2f}"


def shortens(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether any row computed less than all pairs of query and key of its prompts."""
    return any((row.get("pairs") or 1) < 1 for row in rows)


Column = tuple[str, str, Callable[[float | None], str]]
COLUMNS: tuple[Column, ...] = (
    ("kept", "bytes_kept", size),
    ("read/step", "bytes_read", size),
    ("pairs", "pairs", figure),
    ("prefill", "prefill_s", seconds),
    ("decode/token", "decode_s", seconds),
    ("peak memory", "peak_bytes", size),
)


def build_table(rows: list[dict[str, Any]], run: dict[str, Any], *, ratios: bool = True) -> Table:
    """A rich table that fits 120 columns with ``ratios`` to dense, and 80 without.

    Where long texts were generated, fidelity is also drawn along them, from the lowest block of all rows (lowest bar) to 1,
    and ``held`` says whether the method stays at its budget, or by what factor it goes beyond.

    ``rows`` as in results.jsonl, dense first; ``run`` as in run.json.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    dense = next((row for row in rows if row["method"] == "dense"), {})
    quality = next((row["quality_name"] for row in rows if row["quality_name"]), None)
    beside = "; × is relative to dense" if ratios else ""
    count = run["task"]["examples"]
    floor = lowest(rows)
    bars = "" if floor is None else f"; bars: fidelity along the text, {floor:.2f} to 1"
    title = f"{run['model']['id']} on {run['task']['name']}, {count} example{'s' * (count != 1)}{beside}{bars}"
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.show_edge = table.pad_edge = False
    widest = max(len(row["method"]) for row in rows)
    table.add_column("method", overflow="fold", min_width=min(18 if ratios else 10, widest))
    columns = [column for column in COLUMNS if floor is None or column[1] not in ("prefill_s", "peak_bytes")]
    if not shortens(rows):
        columns = [column for column in columns if column[1] != "pairs"]
    costs = [name if ratios else re.split("[/ ]", name)[0] for name, _, _ in columns]
    curve = [] if floor is None else [" along", " held"]
    for name in ("budget", *([quality] if quality else []), "fidelity", *curve, "KL", *costs):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = _cells(row, dense if ratios else {}, bool(quality), columns, floor)
        table.add_row(*cells, end_section=row["method"] == "dense")
    return table


def _curve(row: dict[str, Any], floor: float) -> list[str]:
    """Fidelity along the generated text as bars, and whether the budget holds."""
    blocks = row.get("blocks")
    if not blocks:
        return ["–", "–"]
    holds = {None: "–", True: "yes"}.get(blocks["holds"]) or ratio(max(blocks["of_budget"] or [0]), 1)
    return [" " + sparkline(blocks["fidelity"], floor), f" {holds}"]


def _cells(
    row: dict[str, Any], dense: dict[str, Any], quality: bool, columns: Sequence[Column], floor: float | None
) -> list[str]:
    from rich.markup import escape

    def beside(text: str, key: str) -> str:
        share = "" if row is dense else ratio(row[key], dense.get(key))
        return f"{text} [dim]{share:>5}[/dim]" if dense else text

    cells = [escape(row["method"]), row["budget"]]
    if quality:
        cells.append(beside(figure(row["quality"]), "quality"))
    cells += [figure(row["fidelity"]), *([] if floor is None else _curve(row, floor)), figure(row["kl"])]
    return cells + [show(row.get(key)) if key == "pairs" else beside(show(row[key]), key) for _, key, show in columns]


def view_table(views: Sequence[Any]) -> Table:
    """What ``laconic see`` prints: a line per recipe with its answer, tokens, bytes and time beside dense."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from laconic.vision.overlay import kept_of

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("recipe", "answer", "picture tokens", "cache", "prefill", "decode/token"):
        table.add_column(name, justify="left" if name in ("recipe", "answer") else "right")
    dense = views[0]
    for view in views:
        cells = [kept_of(view)]
        for value, reference, show in (
            (view.bytes_kept, dense.bytes_kept, size), (view.prefill_s, dense.prefill_s, seconds),
            (view.decode_s, dense.decode_s, seconds),
        ):  # fmt: skip
            cells.append(f"{show(value)} {'' if view is dense else ratio(value, reference)}".strip())
        table.add_row(view.recipe, Text(view.answer, "" if view.answer == dense.answer else "red"), *cells)
    return table
