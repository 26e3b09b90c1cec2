"""Heat maps of a report: how often the answer is right by prompt length and by where the fact stands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

AXES = ("depth", "direction")  # what runs down a map, in order of preference; length runs across


def heat_maps(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Small maps per method (down) and budget (across), or None where examples have no length and depth.

    Returns:
        ``axis``: "depth" or "direction"; ``places`` and ``lengths``: the texts along both axes; ``budgets``: columns;
        ``methods``: one entry each with ``name`` and ``maps`` (one per budget, None where not measured); ``dense``: the
        reference's map. A map has ``mean`` and ``lines``, a line per place of cells ``{share, right, count}`` or None.
    """
    metas = [cell.get("meta") or {} for row in rows for cell in row.get("cells") or [] if _judged(cell)]
    axis = next((name for name in AXES if any(_has(meta, name) for meta in metas)), None)
    if axis is None:
        return None
    metas = [meta for meta in metas if _has(meta, axis)]
    lengths = sorted({meta["length"] for meta in metas})
    places = list(dict.fromkeys(meta[axis] for meta in metas))
    places = sorted(places) if axis == "depth" else places
    maps = {(row["method"], row.get("budget", "")): _map(row, axis, places, lengths) for row in rows}
    names = list(dict.fromkeys(method for method, _ in maps if method != "dense"))
    budgets = list(dict.fromkeys(budget for method, budget in maps if method != "dense"))
    return {
        "axis": axis,
        "places": [f"{place:.0%}" if axis == "depth" else str(place) for place in places],
        "lengths": [f"{length:,}" for length in lengths],
        "budgets": budgets,
        "methods": [{"name": name, "maps": [maps.get((name, budget)) for budget in budgets]} for name in names],
        "dense": next((found for (method, _), found in maps.items() if method == "dense"), None),
    }


def _has(meta: dict[str, Any], axis: str) -> bool:
    """Whether an example has its place on a map; a task file may call anything depth or length."""
    kind = (int, float) if axis == "depth" else str
    return isinstance(meta.get(axis), kind) and isinstance(meta.get("length"), (int, float))


def _judged(cell: dict[str, Any]) -> bool:
    return cell.get("correct") is not None


def _map(row: dict[str, Any], axis: str, places: Sequence[Any], lengths: Sequence[Any]) -> dict[str, Any] | None:
    found: dict[tuple[Any, Any], list[float]] = defaultdict(list)
    for cell in filter(_judged, row.get("cells") or []):
        meta = cell.get("meta") or {}
        if _has(meta, axis):
            found[meta[axis], meta["length"]].append(float(cell["correct"]))
    if not found:
        return None

    def summary(scores: list[float]) -> dict[str, Any]:
        return {"share": sum(scores) / len(scores), "right": sum(scores), "count": len(scores)}

    lines = [[summary(found[p, n]) if (p, n) in found else None for n in lengths] for p in places]
    scores = [score for group in found.values() for score in group]
    return {"lines": lines, "mean": sum(scores) / len(scores)}
