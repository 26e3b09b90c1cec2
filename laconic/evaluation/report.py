"""The page of a comparison: one self-contained HTML file made of results.jsonl and run.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laconic.errors import LaconicError
from laconic.evaluation.table import figure, ratio, seconds, size

# Okabe and Ito's palette, which people with any colour vision can tell apart; dense is drawn in the text colour.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F", "#B22222", "#4B0092")
COSTS = (  # key of a row, title of the axis, divisor
    ("kept_share", "entries attended, share of dense", 1.0),
    ("bytes_read", "cache bytes read per decode step (MB)", 1e6),
    ("bytes_kept", "cache bytes kept (MB)", 1e6),
    ("decode_s", "decode time per token (ms)", 1e-3),
    ("prefill_s", "prefill time (s)", 1.0),
    ("peak_bytes", "peak memory above the weights (MB)", 1e6),
)
COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("fidelity", "fidelity", figure),
    ("kl", "KL (nats)", lambda value: "–" if value is None else f"{value:.3g}"),
    ("bytes_kept", "kept", size),
    ("bytes_read", "read per step", size),
    ("prefill_s", "prefill", seconds),
    ("decode_s", "decode per token", seconds),
    ("peak_bytes", "peak memory", size),
    ("dropped_mass", "mass not read", figure),
)
PLOT = {"displayModeBar": False, "responsive": True}


def write_report(directory: str | Path) -> Path:
    """Writes ``directory/index.html`` and returns its path.

    Partial results of an interrupted run make a page too. Raises LaconicError when the results cannot be read or the page
    cannot be written; the results stay as they are.
    """
    directory = Path(directory)
    run, rows = _read(directory)
    page = _render(run, rows)
    target, temporary = directory / "index.html", directory / "index.html.tmp"
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LaconicError(
            f"The report page cannot be written to {target} ({error.strerror}): the results are safe in results.jsonl; "
            "make room or choose another --output and run the same command again."
        ) from error
    return target


def _read(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        run = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        lines = (directory / "results.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, json.JSONDecodeError) as error:
        raise LaconicError(f"There is no readable comparison in {directory}: run `laconic compare` first.") from error
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the torn last line of a killed run
            continue
    rows = [row for row in rows if row.get("run") == run.get("fingerprint")]
    if not rows:
        raise LaconicError(f"No cell is finished in {directory}: run the same `laconic compare` again to go on.")
    return run, rows


def _render(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    from jinja2 import Environment, PackageLoader, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("laconic.evaluation", "templates"),
        autoescape=select_autoescape(("html", "j2")),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip([n for n in names if n != "dense"], PALETTE * 4, strict=False))
    dense = next((row for row in rows if row["method"] == "dense"), None)
    heats = _heat_maps(rows)
    figures: dict[str, str] = {"pareto": _pareto(rows, colours)}
    if heats:
        figures["heat"] = _heat_figure(heats)
    return environment.get_template("report.html.j2").render(
        run=run,
        rows=[_line(row, dense, colours) for row in rows],
        columns=[title for _, title, _ in COLUMNS],
        quality=_quality_title(rows),
        sections=[_section(name, rows, colours) for name in names],
        figures={name: Markup(figure_json) for name, figure_json in figures.items()},
        plotly=Markup(_plotly()),
        plot=Markup(json.dumps(PLOT)),
        missing=len(run.get("methods", [])) and run.get("finished") is None,
        best=_best(rows),
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _quality_key(rows: list[dict[str, Any]]) -> str:
    return "quality" if any(row.get("quality") is not None for row in rows) else "fidelity"


def _lower_is_better(rows: list[dict[str, Any]]) -> bool:
    return any(row.get("quality_name") == "perplexity" for row in rows)


def _quality_title(rows: list[dict[str, Any]]) -> str:
    name = next((row["quality_name"] for row in rows if row.get("quality_name")), None)
    if name is None:
        return "fidelity to dense (top-1 agreement)"
    return "perplexity (lower is better)" if name == "perplexity" else f"accuracy ({name.replace('_', ' ')})"


def _front(rows: list[dict[str, Any]], key: str, cost: str) -> list[dict[str, Any]]:
    """Rows that no other row beats in both quality and cost, from cheap to dear."""
    sign = -1 if key == "quality" and _lower_is_better(rows) else 1
    known = [row for row in rows if row.get(key) is not None and row.get(cost) is not None]
    front: list[dict[str, Any]] = []
    for row in sorted(known, key=lambda r: (r[cost], -sign * r[key])):
        if not front or sign * row[key] > sign * front[-1][key]:
            front.append(row)
    return front


def _best(rows: list[dict[str, Any]], keep: float = 0.99) -> dict[str, Any] | None:
    """The cell that reads the fewest bytes while it keeps 99 % of the dense quality; None when no cell but dense does."""
    key = _quality_key(rows)
    dense = next((row for row in rows if row["method"] == "dense"), None)
    if dense is None or dense.get(key) is None or (key == "quality" and _lower_is_better(rows)):
        return None
    good = [r for r in rows if r["method"] != "dense" and (r.get(key) or 0) >= keep * dense[key] and r.get("bytes_read")]
    return min(good, key=lambda row: row["bytes_read"]) if good else None


def _pareto(rows: list[dict[str, Any]], colours: dict[str, str]) -> str:
    """Quality over cost, with a menu for either axis."""
    import plotly.graph_objects as go

    key = _quality_key(rows)
    axes_y = [(key, _quality_title(rows))] + ([("fidelity", "fidelity to dense (top-1 agreement)")] if key == "quality" else [])
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure_ = go.Figure()
    for name in names:
        own = sorted((row for row in rows if row["method"] == name), key=lambda r: r.get("kept") or 0)
        figure_.add_scatter(
            **_xy(own, *axes_y[0][:1], *COSTS[0][::2]),
            name=name,
            mode="markers" if name == "dense" else "lines+markers",
            marker={"size": 15 if name == "dense" else 9, "symbol": "star" if name == "dense" else "circle"},
            line={"color": colours.get(name, "#666"), "width": 2},
            text=[f"{row['recipe']}" for row in own],
            hovertemplate="<b>%{text}</b><br>%{y:.3f} at %{x:.4g}<extra></extra>",
        )
    figure_.add_scatter(
        **_xy(_front(rows, key, COSTS[0][0]), key, *COSTS[0][::2]), name="best at its cost", mode="lines", hoverinfo="skip",
        line={"color": "rgba(128,128,128,.35)", "width": 10, "shape": "hv"},
    )  # fmt: skip

    def choice(y: tuple[str, str], cost: tuple[str, str, float]) -> dict[str, Any]:
        series = [sorted((r for r in rows if r["method"] == n), key=lambda r: r.get("kept") or 0) for n in names]
        series.append(_front(rows, y[0], cost[0]))
        data = [_xy(own, y[0], cost[0], cost[2]) for own in series]
        update = {"x": [d["x"] for d in data], "y": [d["y"] for d in data]}
        return {"update": update, "x": cost[1], "y": y[1]}

    choices = {f"{y[0]}|{cost[0]}": choice(y, cost) for y in axes_y for cost in COSTS}
    figure_.update_layout(
        xaxis={"title": COSTS[0][1], "rangemode": "tozero"},
        yaxis={"title": axes_y[0][1]},
        legend={"orientation": "h", "y": -0.22},
        margin={"l": 60, "r": 20, "t": 20, "b": 60},
        height=520,
    )
    menus = {"y": [list(y) for y in axes_y], "x": [[cost[0], cost[1]] for cost in COSTS]}
    return _script({"figure": json.loads(figure_.to_json()), "choices": choices, "menus": menus})


def _xy(rows: list[dict[str, Any]], y: str, x: str, divisor: float) -> dict[str, list[float | None]]:
    return {"x": [None if row.get(x) is None else row[x] / divisor for row in rows], "y": [row.get(y) for row in rows]}


def _heat_maps(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per recipe, the mean correctness by depth and length; empty for tasks without depth."""
    maps: dict[str, dict[str, Any]] = {}
    for row in rows:
        grid: dict[tuple[float, int], list[float]] = {}
        for cell in row.get("cells", []):
            meta = cell.get("meta") or {}
            value = cell["correct"] if cell.get("correct") is not None else cell.get("fidelity")
            if meta.get("depth") is not None and meta.get("length") is not None and value is not None:
                grid.setdefault((meta["depth"], meta["length"]), []).append(value)
        if not grid:
            continue
        depths, lengths = sorted({d for d, _ in grid}), sorted({n for _, n in grid})
        mean = [[sum(v) / len(v) if (v := grid.get((d, n))) else None for n in lengths] for d in depths]
        maps[row["recipe"]] = {"depths": depths, "lengths": lengths, "z": mean, "method": row["method"]}
    return maps


def _heat_figure(maps: dict[str, dict[str, Any]]) -> str:
    """One small map per recipe, side by side."""
    from plotly.subplots import make_subplots

    across = 4
    down = -(-len(maps) // across)
    figure_ = make_subplots(
        rows=down, cols=across, subplot_titles=list(maps), horizontal_spacing=0.04, vertical_spacing=min(0.9 / down, 0.32 / down),
        shared_yaxes=True,
    )  # fmt: skip
    for i, grid in enumerate(maps.values()):
        figure_.add_heatmap(
            z=grid["z"],
            x=[str(n) for n in grid["lengths"]],
            y=[f"{depth:.0%}" for depth in grid["depths"]],
            zmin=0, zmax=1, colorscale="Cividis", xgap=2, ygap=2, showscale=i == 0,
            colorbar={"title": "correct", "len": min(1.0, 1.6 / down), "y": 1, "yanchor": "top", "thickness": 12},
            hovertemplate="%{x} tokens, depth %{y}: %{z:.2f}<extra></extra>",
            row=i // across + 1, col=i % across + 1,
        )  # fmt: skip
    figure_.update_yaxes(autorange="reversed", type="category")
    figure_.update_yaxes(title="depth", col=1)
    figure_.update_xaxes(type="category")
    figure_.update_xaxes(title="tokens", row=down)
    figure_.update_annotations(font_size=12)
    figure_.update_layout(height=90 + 190 * down, margin={"l": 60, "r": 20, "t": 40, "b": 50})
    return _script({"figure": json.loads(figure_.to_json())})


def _script(data: dict[str, Any]) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(data).replace("</", "<\\/").replace("<!--", "<\\!--")


def _line(row: dict[str, Any], dense: dict[str, Any] | None, colours: dict[str, str]) -> dict[str, Any]:
    """One line of the main table: texts, ratios to dense, and the numbers to sort by."""
    cells = []
    for key, _, show in COLUMNS:
        value = row.get(key)
        beside = ratio(value, dense.get(key)) if dense and row is not dense and key not in ("kl", "dropped_mass", "fidelity") else ""
        cells.append({"text": show(value), "beside": beside, "sort": value if value is not None else -1})
    quality = row["quality"] if row.get("quality") is not None else row.get("fidelity")
    return {
        "method": row["method"], "budget": row["budget"], "recipe": row["recipe"], "colour": colours.get(row["method"], "currentColor"),
        "quality": figure(quality), "sort": quality if quality is not None else -1, "cells": cells,
    }  # fmt: skip


def _section(name: str, rows: list[dict[str, Any]], colours: dict[str, str]) -> dict[str, Any]:
    """What is said about one method: from its class, and an answer that it got right and one that it got wrong."""
    from laconic import methods

    own = [row for row in rows if row["method"] == name]
    entry = next((item for item in methods() if item["id"] == name), None)
    answers = [(row["recipe"], cell) for row in own for cell in row.get("cells", []) if cell.get("correct") is not None]
    if entry:
        entry["summary"] = entry["summary"].replace("`", "")
    right = next(((recipe, cell) for recipe, cell in answers if cell["correct"] >= 1), None)
    wrong = next(((recipe, cell) for recipe, cell in answers if cell["correct"] < 1), None)
    return {
        "name": name, "colour": colours.get(name, "currentColor"), "entry": entry, "rows": own,
        "right": right, "wrong": wrong, "figure": figure, "size": size, "seconds": seconds,
    }  # fmt: skip
