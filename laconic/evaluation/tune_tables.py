"""What ``laconic tune`` prints: how far each method came, and what the recipe costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laconic.evaluation.table import ratio, seconds, size
from laconic.evaluation.verdict import percent

if TYPE_CHECKING:
    from rich.table import Table

    from laconic.evaluation.tune import TunedRecipe

COSTS = {
    "bytes_read": ("Reads {} per decode step", size),
    "bytes_kept": ("Keeps {} in the cache", size),
    "decode_s": ("Takes {} per decode step", seconds),
}
WHY = {"quality": "keeps too little", "cost": "dearer than the best", "refused": "cannot run"}


def cost_line(tuned: TunedRecipe) -> str:
    """The cost on the held-out prompts, beside dense."""
    key = tuned.run["cost"]
    text, show = COSTS[key]
    dense, row = tuned.rows[0], tuned.rows[-1]
    return f"{text.format(show(row[key]))}, dense {show(dense[key])} ({ratio(row[key], dense[key])})."


def tried_table(tuned: TunedRecipe) -> Table:
    """One line per entry of the search: its cheapest recipe that keeps enough, or else the one that kept most."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    key, keep = tuned.run["cost"], tuned.run["keep"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in tuned.tried:
        groups.setdefault(row["params"]["method"], []).append(row)
    title = f"{len(tuned.tried)} recipes tried, keep {percent(keep)}; the best of each method on the search half"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.show_edge = table.pad_edge = False
    table.add_column("recipe", overflow="fold")
    for name in ("cost", "of dense", "kept", "tried"):
        table.add_column(f"  {name}", justify="right", no_wrap=True)
    table.add_column("  ")
    best = [(_best(rows, keep), rows) for rows in groups.values()]
    for row, rows in sorted(best, key=lambda pair: (_enough(pair[0], keep) is False, pair[0]["cost"])):
        show, dense = COSTS[key][1], tuned.rows[0][key]
        why = WHY.get(row["stopped"] or ("" if _enough(row, keep) else "quality"), "")
        kept = "–" if row["stopped"] else percent(row["kept_quality"])
        cells = [escape(row["recipe"]), show(row["cost"]), ratio(row["cost"], dense), kept, str(len(rows)), f"  {why}"]
        table.add_row(*cells)
    return table


def _enough(row: dict[str, Any], keep: float) -> bool:
    return row["stopped"] is None and row["kept_quality"] >= keep - 1e-9


def _best(rows: list[dict[str, Any]], keep: float) -> dict[str, Any]:
    good = [row for row in rows if _enough(row, keep)]
    if good:
        return min(good, key=lambda row: row["cost"])
    dearer = [row for row in rows if row["stopped"] == "cost"]
    return min(dearer, key=lambda row: row["cost"]) if dearer else max(rows, key=lambda row: row["kept_quality"])
