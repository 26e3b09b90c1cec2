"""Answers by kind of question, where a task asks several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

PREFIX = "kind:"


def kinds_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds of questions in the examples, in order; empty where there are fewer than two."""
    found = dict.fromkeys(
        cell["meta"]["type"] for row in rows for cell in row.get("cells") or [] if (cell.get("meta") or {}).get("type")
    )
    return list(found) if len(found) > 1 else []


def with_kinds(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the share of right answers of each kind under ``kind:NAME``."""
    right = defaultdict(list)
    for cell in row.get("cells") or []:
        kind = (cell.get("meta") or {}).get("type")
        if kind and cell.get("correct") is not None:
            right[kind].append(float(cell["correct"]))
    return {**row, **{PREFIX + kind: sum(values) / len(values) for kind, values in right.items()}}


def kind_table(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """``kinds`` and ``lines``: method, budget and the share right of each kind, as whole percentages; None without kinds."""
    kinds = kinds_of(rows)
    if not kinds:
        return None
    lines = []
    for row in map(with_kinds, rows):
        known = [row.get(PREFIX + kind) for kind in kinds]
        shares = [None if share is None else round(100 * share) for share in known]
        lines.append({"method": row["method"], "budget": row.get("budget", ""), "shares": shares})
    counts = [sum((cell.get("meta") or {}).get("type") == kind for cell in rows[0].get("cells") or []) for kind in kinds]
    return {"kinds": kinds, "counts": counts, "lines": lines}
