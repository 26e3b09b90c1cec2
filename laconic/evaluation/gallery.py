"""The gallery of a comparison on pictures: which patches every method keeps at every budget, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from laconic.errors import LaconicError
from laconic.evaluation.results import write_atomic

if TYPE_CHECKING:
    from laconic.evaluation.measure import Item, Runner
    from laconic.evaluation.plan import Cell

FILE = "gallery.json"
PICTURES = 3  # examples that are shown, of different kinds where there are any
SIDE = 192  # pixels of one


def choose(items: Sequence[Item]) -> list[int]:
    """Numbers of the examples to show: with pictures, the first of each kind of question, then others."""
    seeing = [i for i, item in enumerate(items) if item.example.pictures]
    first: dict[Any, int] = {}
    for i in seeing:
        first.setdefault(items[i].example.meta.get("type"), i)
    return (list(first.values()) + [i for i in seeing if i not in first.values()])[:PICTURES]


def write_gallery(directory: Path, runner: Runner, reader: Any, items: Sequence[Item], cells: Sequence[Cell]) -> None:
    """Runs every cell once on a few examples and writes what stays of their pictures to ``gallery.json``."""
    shown = []
    for i in choose(items):
        item = items[i]
        entries = [entry for cell in cells if (entry := _entry(runner, reader, item, cell)) is not None]
        shown.append({"example": i, "question": item.example.prompt, "answer": item.example.answer, "entries": entries})
    write_atomic(directory / FILE, json.dumps(shown))


def _entry(runner: Runner, reader: Any, item: Item, cell: Cell) -> dict[str, Any] | None:
    """One recipe on one example: its overlay; None where the recipe cannot work or leaves pictures alone."""
    from laconic import apply
    from laconic.models.reading import open_picture
    from laconic.vision.overlay import data_address, overlay
    from laconic.vision.see import as_seen
    from laconic.vision.see import shown as look

    ids = torch.tensor([item.ids[: item.prefill]], device=runner.device)
    inputs = {"input_ids": ids, **{name: value.to(runner.device) for name, value in item.inputs.items()}}
    picture = as_seen(open_picture(item.example.pictures[0]), inputs, reader, 0)
    if cell.name == "dense":
        return {"method": "dense", "budget": "", "image": data_address(picture.resize((SIDE, SIDE)), "jpeg"), "kept": None}
    try:
        with apply(runner.model, cell.recipe) as handle, torch.inference_mode():
            runner.model(**inputs)
            found = look(handle, ids)
    except LaconicError:
        return None
    if not found:
        return None
    image = overlay(picture, found[0], side=SIDE)
    return {"method": cell.name, "budget": cell.budget, "image": data_address(image, "jpeg"), "kept": found[0].kept}


def read_gallery(directory: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``write_gallery`` wrote, with the answers that the rows hold; empty where there is none."""
    try:
        shown = json.loads((directory / FILE).read_text(encoding="utf-8"))
        known = {(row["method"], row.get("budget", "")): row.get("cells") or [] for row in rows}
        for part in shown:
            for entry in part["entries"]:
                cells = next((c for (m, b), c in known.items() if m == entry["method"] and b in (entry["budget"], "100%")), [])
                cell = cells[part["example"]] if part["example"] < len(cells) else {}
                entry["prediction"], entry["correct"] = cell.get("prediction"), cell.get("correct")
        return shown
    except (OSError, ValueError, KeyError, TypeError):
        return []
