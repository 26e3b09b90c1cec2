"""One decode step under every method that reads a part, against the stock step and our own exact one."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import laconic
from laconic.bench.figure import Figure, Say, interleave, milliseconds
from laconic.bench.steps import OurStep, Shape, StockStep
from laconic.errors import LaconicError
from laconic.profiles import Profile

GOAL = "every method that reads a part: a decode step of 2,048 tokens read, faster than stock and than exact, at each length"
LAYERS = 8  # a method may choose in one layer and read in the next; times are per layer


def run(quick: bool, say: Say) -> Figure:
    """The headline is the slowest method at the longest length in float32, against stock."""
    shapes = [Shape(512), Shape(1024)] if quick else [Shape(32_768), Shape(131_072), Shape(524_288, dtype=torch.bfloat16)]
    kept, repeats, layers = (128, 2, 2) if quick else (2048, 5, LAYERS)
    tables = [measure(shape, kept, repeats, layers, say) for shape in shapes]
    main = tables[1]
    slowest = max(main["methods"], key=lambda name: main["methods"][name]["ms"])
    return Figure(
        ours=main["methods"][slowest]["ms"],
        reference=main["stock_ms"],
        target=1.0,
        unit="ms",
        conditions={
            f"faster_than_exact_{table['shape']['tokens']}": all(row["against_exact"] > 1 for row in table["methods"].values())
            for table in tables
        },
        detail={"kept": kept, "layers": layers, "slowest": slowest, "sizes": tables, "repeats": repeats},
    )


def recipes(kept: int, layers: int, shape: Shape, folder: Path) -> dict[str, str]:
    """Every registered method that reads, at ``kept`` tokens; the ones that can use 8-bit keys also so.

    The profile that ``fasa`` gets is made up: with random keys all pairs of dimensions are alike, and the time is the same.
    """
    found = {}
    for row in laconic.methods():
        if row["verbs"][:1] != ["read"]:
            continue
        if row["id"] == "fasa":
            ranking = [[list(range(shape.head_dim // 2))] * shape.kv_heads] * layers
            Profile("fasa", {}, 0, "", {"rope": "half", "ranking": ranking}).save(folder / "fasa.json")
            found["fasa"] = f"fasa(profile={folder / 'fasa.json'}):{kept}"
        elif row["needs"] == "nothing":
            found[row["id"]] = f"{row['id']}:{kept}"
            if any(item["name"] == "int8" and not item["default"] for item in row["parameters"]):
                found[f"{row['id']}, int8"] = f"{row['id']}(int8=true):{kept}"
    return found


def measure(shape: Shape, kept: int, repeats: int, layers: int, say: Say) -> dict[str, Any]:
    """Times per layer in ms, and bytes read per layer and step, of all methods at one length."""
    generator = torch.Generator().manual_seed(0)
    keys, values = shape.filled(generator)
    incoming = shape.incoming(repeats + 2, generator)
    steps: dict[str, Any] = {"stock": StockStep(shape, keys, values, incoming)}
    stock_ms = milliseconds(interleave(steps, repeats=repeats, warmup=2, say=say))["stock"]
    exact = OurStep(shape, keys, values, incoming * 64, "dense", layers)
    rows: dict[str, Any] = {}
    done = 0  # the exact step takes its turn beside every method, and so sees more steps than they do
    folder = Path(tempfile.mkdtemp(prefix="laconic-bench-"))
    for name, recipe in recipes(kept, layers, shape, folder).items():
        try:
            ours = OurStep(shape, keys, values, incoming, recipe, layers)
            start = done
            pair = {"exact": lambda i, start=start: exact((start + i) % len(exact.incoming)), name: ours}
            ms = milliseconds(interleave(pair, repeats=repeats, warmup=2, say=say))
        except LaconicError as error:
            say(f"{name} is left out: {error}")
            continue
        done += repeats + 2
        mine, dense = ms[name] / layers, ms["exact"] / layers
        least = kept * shape.kv_heads * shape.head_dim * 2 * shape.dtype.itemsize
        rows[name] = {
            "recipe": recipe, "ms": mine, "against_stock": stock_ms / mine, "against_exact": dense / mine,
            "exact_ms": dense, "bytes_read": ours.bytes_read, "bytes_selected": least,
        }  # fmt: skip
        del ours, pair
    shutil.rmtree(folder)
    return {"shape": shape.describe(), "stock_ms": stock_ms, "methods": rows}
