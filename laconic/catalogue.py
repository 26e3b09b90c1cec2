"""The catalogue of methods for a terminal. Its content comes from the classes (``Method.describe``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def catalogue_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per method. ``rows`` as from ``laconic.methods()``."""
    lines = [
        (row["id"], row["stage"], ", ".join(row["verbs"]) or "–", row["needs"], row["guarantee"], row["summary"])
        for row in rows
    ]
    return _table(("method", "stage", "verbs", "needs", "guarantee", "what it does"), lines)


def method_page(row: dict[str, Any]) -> Group:
    """Everything about one method: source, guarantee, docstring, parameters, how to write it in a recipe."""
    from rich.console import Group
    from rich.text import Text

    name = row["id"]
    head = (
        f"{name}: {', '.join([row['stage'], *row['verbs']])}\n"
        f"Paper: {row['paper']}\nNeeds: {row['needs']}\nGuarantee: {row['guarantee']}\n\n{row['text']}\n"
    )
    head += "".join(f"\nMeasured, {sentence}" for sentence in row["measured"]) + "\n" * bool(row["measured"])
    lines = [(item["name"], item["type"], str(item["default"]), item["help"]) for item in row["parameters"]]
    others = [item for item in row["parameters"] if item["name"] != "budget" and item["default"] != ""]
    usual = next(str(item["default"]) for item in row["parameters"] if item["name"] == "budget")
    few, many = (":256", ":10%") if usual.endswith("%") else (f":{usual}", f":{usual}")  # of what is drafted, a number
    if not row["takes_budget"]:
        few = many = ""
    recipe = f"Recipe: {name}{many}" + (f" or {name}({others[0]['name']}={others[0]['default']}){few}" if others else "")
    return Group(Text(head), _table(("parameter", "type", "default", "meaning"), lines), Text(recipe))


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i == 0)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table
