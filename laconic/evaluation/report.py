"""The page of a comparison: ``results.jsonl`` and ``run.json`` of a directory as one ``index.html``.

The page is self-contained: scripts, styles and data are inside, and its content security policy forbids every request.
It shows what is there: rows of an interrupted run, tasks without answers, and examples without length and depth are fine.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from laconic.errors import LaconicError
from laconic.evaluation.answers import pick_answers
from laconic.evaluation.blocks import curves
from laconic.evaluation.gallery import read_gallery
from laconic.evaluation.heatmap import heat_maps
from laconic.evaluation.kinds import PREFIX, kind_table, kinds_of, with_kinds
from laconic.evaluation.quality import share_kept
from laconic.evaluation.results import HEADER, RESULTS, read_rows, write_atomic
from laconic.evaluation.table import figure, ratio, seconds, shortens, size

Row = dict[str, Any]

PAGE = "index.html"
KEEP = 0.99  # a recipe is recommended when it keeps this share of the dense quality
STYLES = 8  # colours in the style sheet; the script tells more methods apart by symbols

METRICS = {
    "exact": "accuracy (the answer equals)",
    "contains": "accuracy (the answer is contained)",
    "regex": "accuracy (the answer matches)",
    "choice": "accuracy (the right choice)",
    "rouge_l": "ROUGE-L",
    "perplexity": "perplexity (lower is better)",
}
FIDELITY = "fidelity (same next token as dense)"


def percent(value: float | None) -> str:
    """A share as a percentage with as many digits as help: 5.1 %, 100 %."""
    if value is None:
        return "–"
    points = 100 * value
    return f"{points:.0f} %" if points >= 9.95 or points == 0 else f"{points:.1f} %"


# key, name, title of the plot's axis, format
COSTS = (
    ("kept_share", "tokens kept", "tokens kept, share of the text", "percent"),
    ("bytes_read", "bytes read per step", "bytes read per decode step", "bytes"),
    ("decode_s", "decode time", "decode time per token", "seconds"),
    ("peak_bytes", "peak memory", "peak memory above the weights", "bytes"),
    ("prefill_s", "prefill time", "prefill time per prompt", "seconds"),
)
CHOICES = (
    ("bytes_read", "Fewest bytes read per step", size),
    ("bytes_kept", "Smallest cache", size),
    ("decode_s", "Fastest decoding", seconds),
)
UNREAD = "attention mass on cached tokens that a step did not read, longest example; forgotten tokens are not in it"
Column = tuple[str, str, str, Callable[[float | None], str], bool]
# key, heading, meaning, format, whether the ratio to dense stands beside it
COLUMNS: tuple[Column, ...] = (
    ("fidelity", "fidelity", "share of steps with the same most likely token as dense", figure, False),
    ("kl", "KL", "divergence from the dense next-token distribution, nats, mean over steps", figure, False),
    ("dropped_mass", "unread mass", UNREAD, figure, False),
    ("kept_share", "kept", "tokens attended to, share of all seen", percent, False),
    ("bytes_kept", "cache", "bytes of keys and values that stay in memory", size, True),
    ("bytes_read", "read/step", "bytes read per decode step", size, True),
    ("pairs", "pairs", "share of the prompt's pairs of query and key that was computed, mean over layers", percent, False),
    ("prefill_s", "prefill", "seconds per prompt", seconds, True),
    ("decode_s", "decode/token", "seconds per decoded token", seconds, True),
    ("peak_bytes", "peak memory", "highest memory use above the weights, longest example", size, True),
)


def write_report(directory: str | Path) -> Path:
    """Writes ``index.html`` from the results in ``directory``, in one step, and returns its path.

    Raises:
        LaconicError: there are no results in it, or the page cannot be written.
    """
    directory = Path(directory)
    return write_page(
        directory, f"laconic compare --output {directory}", lambda rows, *rest: render(rows, *rest, read_gallery(directory, rows))
    )


def write_page(directory: Path, command: str, render: Callable[[list[Row], dict[str, Any], list[str]], str]) -> Path:
    """Writes ``index.html``, made by ``render`` of rows, header and problems, in one step; ``command`` is what makes results."""
    rows, problems = read_rows(directory / RESULTS)
    if not rows:
        raise LaconicError(f"There are no results in {directory}: run {command} first.")
    page = render(rows, read_header(directory / HEADER), problems)
    write_atomic(directory / PAGE, page.encode("utf-8", "replace").decode())  # a lone surrogate has no UTF-8
    return directory / PAGE


def read_header(path: Path) -> dict[str, Any]:
    """``run.json``; without it, or with a broken one, the page has no header figures but still its rows."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def render(
    rows: Sequence[Row], run: dict[str, Any], problems: Sequence[str] = (), gallery: Sequence[dict[str, Any]] = ()
) -> str:
    """The page as text: ``rows`` as in results.jsonl, ``run`` as in run.json (may be empty), ``problems`` as notes.

    ``gallery``: as ``read_gallery`` gives it.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    # A method whose name is missing is known by its recipe.
    named = [{**row, "method": str(row.get("method") or row["recipe"])} for row in rows]
    view = {**_view(named, run, problems), "gallery": gallery}
    return fill("report.html.j2", {**view, "plotly": Markup(get_plotlyjs())}, script="report.js")


def fill(template: str, view: dict[str, Any], **assets: str) -> str:
    """A page from a template: what it shows, and files that go into it as they are, the style sheet beside."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("laconic.evaluation", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(prose=prose, breakable=breakable, size=size, seconds=seconds, figure=figure, percent=percent)
    assets = {"style": "report.css", "copy": "copy.js", **assets}
    inside = {name: Markup(loader.get_source(environment, file)[0]) for name, file in assets.items()}
    return environment.get_template(template).render(**view, **inside)


def prose(text: str) -> Any:
    """A docstring as HTML paragraphs; double backquotes become code."""
    from markupsafe import Markup, escape

    paragraphs = [str(escape(" ".join(part.split()))) for part in text.split("\n\n") if part.strip()]
    return Markup(re.sub("``(.+?)``", r"<code>\1</code>", "".join(f"<p>{part}</p>" for part in paragraphs)))


def breakable(name: str) -> Any:
    """A name as HTML that may be broken after its underscores, on narrow screens."""
    from markupsafe import Markup, escape

    return Markup(str(escape(name)).replace("_", "_<wbr>"))


def _view(rows: list[Row], run: dict[str, Any], problems: Sequence[str]) -> dict[str, Any]:
    """Everything that the template shows."""
    dense = next((row for row in rows if row["method"] == "dense"), {})
    metric = next((row["quality_name"] for row in rows if row.get("quality_name")), None)
    title = METRICS.get(metric or "", metric)
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    if not shortens(rows):
        columns = [column for column in columns if column[0] != "pairs"]
    if title:
        columns.insert(0, ("quality", title.split(" (")[0], title, figure, True))
    styles = styles_of([row["method"] for row in rows])
    sections = {name: _section(name, style, rows, dense, metric) for name, style in styles.items()}
    return {
        "facts": facts_of(rows, run, title),
        "command": run.get("command"),
        "names": names_of(rows, run),
        "notes": [*run.get("notes", []), *problems],
        "skipped": run.get("skipped", []),
        "unfinished": bool(run) and not run.get("finished"),
        "verdict": _verdict(rows, dense),
        "keep": percent(KEEP),
        "measure": title.split(" (")[0] if title else "fidelity",
        "grain": _grain(rows, metric),
        "columns": [{"key": key, "name": name, "help": text} for key, name, text, _, _ in columns],
        "lines": [_line(i, row, dense, columns, sections[row["method"]]) for i, row in enumerate(rows)],
        "heat": heat_maps(rows),
        "kinds": kind_table(rows),
        "curves": curves(rows),
        "sections": list(sections.values()),
        "plot": _plot(rows, styles, metric),
    }


def names_of(rows: list[Row], run: dict[str, Any]) -> dict[str, str]:
    """Short names of model and task: a path is shown by its last part."""
    model = str((run.get("model") or {}).get("id") or "model")
    task = str((run.get("task") or {}).get("name") or rows[0]["task"])
    return {"model": PurePath(model).name or model, "task": PurePath(task).name or task}


def styles_of(names: Sequence[str]) -> dict[str, str]:
    """A style per method; the reference and the random baseline are neutral, so that the colours go to the methods."""
    styles: dict[str, str] = {}
    for name in dict.fromkeys(names):
        used = sum(style.isdecimal() for style in styles.values())
        styles[name] = name if name in ("dense", "random") else str(used)
    return styles


def _line(number: int, row: Row, dense: Row, columns: Sequence[Column], section: dict[str, Any]) -> dict[str, Any]:
    """A row of the main table: for each column the text, the ratio to dense, and the number to sort by."""
    cells = []
    for key, _, _, show, beside in columns:
        value = row.get(key)
        share = ratio(value, dense.get(key)) if beside and row is not dense else ""
        cells.append({"key": key, "text": show(value), "ratio": share, "sort": value})
    return {"number": number, "section": section, "budget": row.get("budget", ""), "cells": cells}


def facts_of(rows: list[Row], run: dict[str, Any], title: str | None) -> list[tuple[str, str]]:
    """What was run on what, as pairs of a word and a line; only what is known."""
    model, task, machine = run.get("model") or {}, run.get("task") or {}, run.get("machine") or {}
    parameters = f"{model['parameters']:,} parameters" if model.get("parameters") else None
    memory = f"{size(machine['memory'])} memory" if machine.get("memory") else None
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}" if machine.get("threads") else None
    python = f"Python {machine['python']}" if machine.get("python") else None
    count = task.get("examples") or rows[0].get("examples")
    examples = f"{count} example{'s' * (count != 1)}" if count else None
    asked = {"seen": "question seen in prefill", "after": "question after prefill"}.get(str(run.get("question")))
    facts = (
        ("Model", (model.get("id"), model.get("architecture"), parameters, model.get("dtype"))),
        ("Task", (task.get("name") or rows[0]["task"], examples, title, asked)),
        ("Machine", (machine.get("device"), memory, threads, machine.get("system"), python)),
        ("Versions", tuple(f"{name} {version}" for name, version in (run.get("versions") or {}).items())),
        ("Run", (f"seed {run['seed']}" if "seed" in run else None, rows[0]["run"], *_times(run))),
    )
    return [(word, ", ".join(str(part) for part in parts if part)) for word, parts in facts if any(parts)]


def _times(run: dict[str, Any]) -> list[str]:
    """When it ran, and how long it took from the first start to the end."""
    try:
        start = datetime.datetime.fromisoformat(run["started"])
    except (KeyError, TypeError, ValueError):
        return []
    parts = [start.strftime("%Y-%m-%d %H:%M %Z").strip()]
    try:
        took = (datetime.datetime.fromisoformat(run["finished"]) - start).total_seconds()
    except (KeyError, TypeError, ValueError):
        return [*parts, "not finished"]
    return [*parts, f"took {took:.0f} s" if took < 120 else f"took {took / 60:.1f} min"]


def _verdict(rows: list[Row], dense: Row) -> list[dict[str, Any]] | None:
    """The cheapest recipe that keeps the dense quality, by each cost; None where there is nothing to compare."""
    if not dense or len(rows) == 1:
        return None

    choices = []
    for key, title, show in CHOICES:
        able = [row for row in rows if row.get(key) is not None and share_kept(row, dense) >= KEEP]
        best = min(able, key=lambda row: row[key], default=dense)
        texts = {"text": show(best.get(key)), "dense": show(dense.get(key)), "ratio": ratio(best.get(key), dense.get(key))}
        choices.append({"title": title, "best": None if best is dense else best, **texts})
    return choices


def _grain(rows: list[Row], metric: str | None) -> str | None:
    """How much one example weighs, so that nobody reads more out of a small run than it says."""
    examples = rows[0].get("examples")
    if not examples or metric in (None, "perplexity", "rouge_l"):
        return None
    return f"With {examples} examples, one more or less right is {100 / examples:.1f} points."


def _plot(rows: list[Row], styles: dict[str, str], metric: str | None) -> dict[str, Any]:
    """The data of the Pareto plot: axes that have values, and the points of every method."""
    ys = [("quality", METRICS.get(metric, metric), metric != "perplexity", metric == "perplexity")] if metric else []
    ys.append(("fidelity", FIDELITY, True, False))
    rows = [with_kinds(row) for row in rows]
    ys += [(PREFIX + kind, f"{kind} (share of right answers)", True, False) for kind in kinds_of(rows)]
    keys = [*(key for key, *_ in COSTS), *(key for key, *_ in ys)]

    def known(key: str) -> bool:
        return any(row.get(key) is not None for row in rows)

    def point(number: int, row: Row) -> dict[str, Any]:
        return {"number": number, "budget": row.get("budget", ""), **{key: row.get(key) for key in keys}}

    return {
        "x": [{"key": key, "name": name, "title": title, "format": form} for key, name, title, form in COSTS if known(key)],
        "y": [
            {"key": key, "name": title.split(" (")[0], "title": title, "share": share, "lower": lower}
            for key, title, share, lower in ys
            if known(key)
        ],
        "methods": [
            {
                "name": name,
                "style": style,
                "points": [point(i, row) for i, row in enumerate(rows) if row["method"] == name],
            }
            for name, style in styles.items()
        ],
    }


def _section(name: str, style: str, rows: list[Row], dense: Row, metric: str | None) -> dict[str, Any]:
    """All about one method: catalogue entries of its parts, its rows, and two of its answers."""
    own = [row for row in rows if row["method"] == name]
    return {
        "name": name,
        "style": str(int(style) % STYLES) if style.isdecimal() else style,
        "anchor": f"method-{rows.index(own[0])}",
        "entries": entries_of(name),
        "guarantee": own[0].get("guarantee"),
        "answers": pick_answers(own, dense, metric),
        "answered": sum(len(row.get("cells") or []) for row in own),
    }


def entries_of(name: str) -> list[dict[str, Any]]:
    """Catalogue entries of a recipe's methods; none for a method that is not installed here."""
    import laconic

    try:
        catalogue = {entry["id"]: entry for entry in laconic.methods()}
    except LaconicError:  # a broken plug-in does not keep the page from being written
        return []
    parts = re.split(r"\+(?![^()]*\))", name)
    ids = dict.fromkeys(re.split(r"[(:]", part)[0].strip() for part in parts)
    return [catalogue[i] for i in ids if i in catalogue]
