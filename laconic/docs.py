"""The catalogue of methods as Markdown, made from the classes: ``python -m laconic.docs docs/methods.md``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from laconic.errors import LaconicError

_HEAD = """# Methods

Made from the classes by `python -m laconic.docs docs/methods.md`; `laconic methods NAME` shows the same in a terminal.
Every method has a `budget`: tokens (`256`) or a share (`10%`) kept per KV head and layer.
"""


def catalogue_markdown(rows: Sequence[dict[str, Any]] | None = None) -> str:
    """Markdown with a table per stage and a section per method. ``rows`` as from ``laconic.methods()``, the default."""
    if rows is None:
        import laconic

        rows = laconic.methods()
    parts = [_HEAD]
    for stage, group in groupby(rows, key=lambda row: row["stage"]):
        found = list(group)
        lines = [(f"[`{r['id']}`](#{r['id']})", ", ".join(r["verbs"]), r["guarantee"], r["summary"]) for r in found]
        parts.append(f"## {stage.capitalize()}\n\n{_table(('method', 'verbs', 'guarantee', 'what it does'), lines)}\n")
        parts += [_section(row) for row in found]
    return "\n".join(parts)


def _section(row: dict[str, Any]) -> str:
    facts = f"Source: {row['paper']}. Guarantee: {row['guarantee']}. Needs: {row['needs']}."
    lines = [
        (f"`{item['name']}`", item["type"], f"`{_default(item)}`", item["help"])
        for item in row["parameters"]
        if item["name"] != "budget"
    ]
    table = f"\n{_table(('parameter', 'type', 'default', 'meaning'), lines)}\n" if lines else ""
    measured = "".join(f"- {sentence}\n" for sentence in row["measured"])
    measured = f"\nMeasured:\n\n{measured}" if measured else ""
    return f"### {row['id']}\n\n{row['text'].replace('``', '`')}\n\n{facts}\n{table}{measured}"


def _default(item: dict[str, Any]) -> Any:
    """An empty text needs quotes to be seen."""
    return '""' if item["default"] == "" else item["default"]


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _cell(text: str) -> str:
    """A bar would end the cell."""
    return text.replace("``", "`").replace("|", "\\|")


def main(arguments: Sequence[str]) -> None:
    """Writes the catalogue to the file that is named, or to stdout."""
    parser = argparse.ArgumentParser(prog="python -m laconic.docs", description="Write the catalogue of methods as Markdown.")
    parser.add_argument("path", type=Path, nargs="?", help="the file to write; by default stdout")
    path, text = parser.parse_args(arguments).path, catalogue_markdown()
    if path is None:
        print(text, end="")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LaconicError(f"Cannot write {path} ({error.strerror}): name a file that you can write.") from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LaconicError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
