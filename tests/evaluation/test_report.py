"""The page of a comparison: what it says, what it leaves out, and that a browser can show it without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sample_results as sample

from laconic.errors import LaconicError
from laconic.evaluation import report
from laconic.evaluation.answers import pick_answers
from laconic.evaluation.heatmap import heat_maps

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the plotting library: 5 MB that only the browser needs."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly */")


def page_of(directory: Path, rows: list[dict] | None = None, run: dict | None = None) -> str:
    return report.write_report(sample.write_results(directory, rows, run)).read_text(encoding="utf-8")


def words(html: str) -> str:
    """What a reader sees: without scripts, styles and tags."""
    visible = re.sub(r"<(script|style)\b.*?</\1>", " ", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", visible.replace("<wbr>", ""))).split())


def plot_of(html: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def without(rows: list[dict], **changes: Any) -> list[dict]:
    return [{**row, **changes} for row in rows]


# --- what the page says


def test_header_tells_how_to_make_it_again(quick, tmp_path: Path) -> None:
    text = words(page_of(tmp_path))
    for part in (
        "laconic compare --task needle --output 'my report'", "torch 2.13.0", "transformers 5.24.0", "Some Processor",
        "25.0 GB memory", "2 threads", "Python 3.11.7", "1,262,464 parameters", "seed 0", "15 examples", "took 2.5 min",
        "2025-01-01 10:00 UTC", "one more or less right is 6.7 points",
    ):  # fmt: skip
        assert part in text, part
    assert "not finished" not in text


def test_every_row_stands_in_the_table_beside_dense(quick, tmp_path: Path) -> None:
    html, rows = page_of(tmp_path), sample.results()
    body = re.search(r'<section id="table">.*?<tbody>(.*?)</tbody>', html, re.S)[1]
    lines = [words(line) for line in re.findall(r"<tr.*?</tr>", body, re.S)]
    assert [line.split()[:2] for line in lines] == [[row["method"], row["budget"]] for row in rows]
    half = next(line for line in lines if line.startswith("snapkv 50%"))
    assert "6.29 MB ×0.50" in half and "50 %" in half
    assert "×" not in lines[0], "dense is the reference"
    read = next(i for i, row in enumerate(rows) if row["recipe"] == "tokenselect:5%")
    assert f'data-sort="{rows[read]["bytes_read"]}"' in re.findall(r"<tr.*?</tr>", body, re.S)[read]


def test_a_method_has_a_section_with_its_catalogue_entry_and_its_own_figures(quick, tmp_path: Path) -> None:
    html = page_of(tmp_path)
    for name in ("dense", *sample.METHODS):
        article = next(a for a in re.findall(r"<article.*?</article>", html, re.S) if words(a).startswith(f"{name} "))
        for row in (row for row in sample.results() if row["method"] == name):
            figures = next(
                line for line in re.findall(r"<tr>.*?</tr>", article, re.S) if words(line).startswith(row["budget"])
            )
            shown = words(re.sub(r"<small>.*?</small>", "", figures)).split()
            expected = [report.figure(row["quality"]), report.figure(row["fidelity"]), *report.percent(row["kept_share"]).split()]
            assert shown[1:5] == expected, name
    article = words(next(a for a in re.findall(r"<article.*?</article>", html, re.S) if "Heavy-Hitter" in a))
    assert "Guarantee lossy; it evicts" in article and "recent_share" in article and "weakness of the score" in article
    assert "✓ right" in article and "✗ wrong" in article and "expected Velmor Tarin" in article


def test_the_verdict_is_the_cheapest_that_keeps_the_dense_quality(quick, tmp_path: Path) -> None:
    text = words(page_of(tmp_path))
    assert "Fewest bytes read per step tokenselect:5% 2.14 MB, dense 12.6 MB ×0.17" in text
    assert "Smallest cache dense no method here is cheaper and as good" in text  # tokenselect forgets nothing


BASE = {"method": "m", "bytes_read": 5, "bytes_kept": 5, "decode_s": 1.0}
CHEAP = {**BASE, "bytes_read": 1}


@pytest.mark.parametrize(
    ("measure", "name", "dense", "good", "bad"),
    [("quality", "exact", 0.9, 0.8911, 0.88), ("quality", "perplexity", 10.0, 10.05, 99.0), ("fidelity", None, 1.0, 0.995, 0.98)],
)
def test_good_enough_follows_the_measure(measure: str, name: str | None, dense: float, good: float, bad: float) -> None:
    reference = {**BASE, "method": "dense", "bytes_read": 10, "fidelity": 1.0, "quality": None, measure: dense}
    reference["quality_name"] = name
    near, far = {**BASE, measure: good}, {**CHEAP, measure: bad}
    assert report._verdict([reference, near, far], reference)[0]["best"] is near
    assert report._verdict([reference, far], reference)[0]["best"] is None
    assert report._verdict([reference], reference) is None


# --- partial and unusual results


def test_an_interrupted_run_has_a_page_that_says_so(quick, tmp_path: Path) -> None:
    sample.write_results(tmp_path, sample.results()[:6], {**sample.header(), "finished": None})
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"run": "torn')
    text = words(report.write_report(tmp_path).read_text())
    assert "not finished: 6 cells are measured" in text and "results.jsonl line 7 was cut off" in text


def test_methods_that_were_left_out_are_named_with_the_reason(quick, tmp_path: Path) -> None:
    reason = "h2o:5% was left out: it cannot do this"
    run = {**sample.header(), "skipped": [{"recipe": "h2o:5%", "reason": "it cannot do this"}]}
    assert words(page_of(tmp_path, None, run)).count(reason) == 1
    assert words(page_of(tmp_path, None, {**run, "notes": [reason]})).count(reason) == 1


@pytest.mark.parametrize("run", [{}, {"model": None, "task": {}, "machine": {"memory": None}, "started": "yesterday"}])
def test_rows_without_a_header_are_enough(quick, tmp_path: Path, run: dict) -> None:
    text = words(page_of(tmp_path, None, run))
    assert "needle with model" in text and "tokenselect" in text


def test_a_broken_header_is_no_obstacle(quick, tmp_path: Path) -> None:
    sample.write_results(tmp_path)
    for broken in (b"{", b"[1]", b"\xff"):
        (tmp_path / "run.json").write_bytes(broken)
        assert "All figures" in report.write_report(tmp_path).read_text()


def test_a_row_with_nothing_measured_is_shown(quick, tmp_path: Path) -> None:
    html = page_of(tmp_path, [{"run": "r", "recipe": "x:5%", "task": "t"}], {})
    assert "x:5%" in words(html) and plot_of(html)["x"] == plot_of(html)["y"] == []


def test_without_answers_fidelity_is_the_measure(quick, tmp_path: Path) -> None:
    blank = [{**cell, "correct": None, "prediction": None} for cell in sample.cells(sample.random.Random(0), 1)]
    html = page_of(tmp_path, without(sample.results(), quality=None, quality_name=None, cells=blank))
    text = words(html)
    assert [axis["key"] for axis in plot_of(html)["y"]] == ["fidelity"]
    assert "keeps 99 % of the fidelity" in text and "accuracy" not in text and "points." not in text
    assert 'id="heat-maps"' not in html and "✓" not in text


def test_lower_perplexity_is_better(quick, tmp_path: Path) -> None:
    rows = [{**row, "quality": 10 / (0.1 + row["quality"]), "quality_name": "perplexity"} for row in sample.results()]
    html = page_of(tmp_path, rows)
    axis = plot_of(html)["y"][0]
    assert axis["lower"] and not axis["share"] and "lower is better" in axis["title"]
    assert "Fewest bytes read per step tokenselect:5%" in words(html)


def test_a_recipe_of_two_methods_shows_both_entries(quick, tmp_path: Path) -> None:
    rows = sample.results()[:2]
    rows[1] |= {"method": "snapkv(kernel=5):20% + tokenselect:256", "recipe": "snapkv(kernel=5):20% + tokenselect:256"}
    text = words(page_of(tmp_path, rows))
    assert "SnapKV: LLM Knows" in text and "TokenSelect: Efficient" in text
    rows[1] |= {"method": "from_somewhere_else"}
    assert "No catalogue entry" in words(page_of(tmp_path, rows))


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \ud800"


def test_nothing_that_users_or_models_write_becomes_markup(quick, tmp_path: Path) -> None:
    rows = sample.results()[:3]
    for row in rows:
        for cell in row["cells"]:
            cell |= {"prediction": EVIL, "answer": EVIL, "meta": {**cell["meta"], "note": EVIL}}
    rows[1] |= {"method": EVIL, "budget": EVIL, "recipe": EVIL, "guarantee": EVIL}
    run = {**sample.header(), "command": EVIL, "notes": [EVIL], "skipped": [{"recipe": EVIL, "reason": EVIL}]}
    run |= {"model": {"id": EVIL, "architecture": EVIL}, "task": {"name": EVIL}, "versions": {EVIL: EVIL}}
    html = page_of(tmp_path, rows, run)
    assert "<script>alert" not in html and "<img" not in html and ">49<" not in html
    assert html.count("<script") == 3, "the data, the library, our script"
    assert plot_of(html)["methods"][1]["name"] == EVIL  # JSON escapes, so it comes back whole


# --- the parts


def test_heat_maps_are_shares_by_depth_and_length() -> None:
    def cell(depth: float, length: int, correct: float | None) -> dict:
        return {"meta": {"depth": depth, "length": length}, "correct": correct}

    cells = [cell(0.5, 2048, 1), cell(0.5, 2048, 0), cell(0.0, 1024, 1), cell(1.0, 1024, None)]
    rows = [
        {"method": "dense", "budget": "100%", "cells": [cell(0.0, 1024, 1)]},
        {"method": "a", "budget": "5%", "cells": cells},
        {"method": "b", "budget": "10%", "cells": []},
    ]
    found = heat_maps(rows)
    assert (found["places"], found["lengths"], found["budgets"]) == (["0%", "50%"], ["1,024", "2,048"], ["5%", "10%"])
    first = found["methods"][0]["maps"][0]
    assert first["mean"] == pytest.approx(2 / 3)
    assert first["lines"] == [[{"share": 1, "right": 1, "count": 1}, None], [None, {"share": 0.5, "right": 1, "count": 2}]]
    assert found["methods"][0]["maps"][1] is None and found["methods"][1]["maps"] == [None, None]
    assert found["dense"]["mean"] == 1


def test_threads_have_their_direction_for_depth_and_other_tasks_no_map() -> None:
    def rows(meta: dict) -> list[dict]:
        return [{"method": "a", "budget": "5%", "cells": [{"meta": meta, "correct": 1}]}]

    assert heat_maps(rows({"direction": "backward", "length": 1024}))["places"] == ["backward"]
    assert heat_maps(rows({"length": 1024})) is heat_maps(rows({"line": 3})) is heat_maps([{"method": "a"}]) is None
    for odd in ("deep", None, [1], {}):
        assert heat_maps(rows({"depth": odd, "length": 1024})) is heat_maps(rows({"depth": 0.5, "length": odd})) is None


def test_answers_come_from_the_smallest_budget_beside_the_dense_answer() -> None:
    def row(budget: str, share: float, *cells: tuple[float, str]) -> dict:
        made = [{"meta": {"end": ["A", "B"], "hops": 3}, "answer": r"\AA", "correct": c, "prediction": p} for c, p in cells]
        return {"budget": budget, "kept_share": share, "cells": made}

    dense = row("100%", 1.0, (1, "A"), (1, "B"))
    picked = pick_answers([row("50%", 0.5, (1, "x"), (0, "y")), row("5%", 0.05, (0, "z"), (0, "w"))], dense, "regex")
    assert [(a["right"], a["said"], a["dense"]) for a in picked] == [(True, "x", "A"), (False, "z", "A")]
    assert picked[0]["where"] == "budget 50%, example 1, hops 3" and picked[0]["expected"] == "A or B"
    assert pick_answers([dense], dense, "regex")[0]["dense"] is None
    assert pick_answers([row("5%", 0.1, (0.7, "r"))], {}, "rouge_l")[0]["score"] == "0.70"
    assert len(pick_answers([row("5%", 0.1, (1, "long " * 500))], {}, None)[0]["said"]) == 400


@pytest.mark.parametrize(("share", "text"), [(None, "–"), (0, "0 %"), (0.051, "5.1 %"), (0.1, "10 %"), (1, "100 %")])
def test_percent(share: float | None, text: str) -> None:
    assert report.percent(share) == text


# --- errors


def test_no_results_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LaconicError, match=r"There are no results in .*: run laconic compare"):
        report.write_report(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(quick, tmp_path: Path, monkeypatch) -> None:
    old = page_of(tmp_path)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("laconic.evaluation.results.os.fsync", full)
    with pytest.raises(LaconicError, match=r"index.html .No space left on device."):
        report.write_report(tmp_path)
    assert (tmp_path / "index.html").read_text() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "results.jsonl", "run.json"]


# --- in a browser

PROBE = """<script>
window.addEventListener("load", () => {
  const told = {}, names = () => [...document.querySelectorAll("#table tbody tr")].map((row) => row.dataset.number);
  told.traces = document.querySelectorAll("#plot svg.main-svg .scatterlayer .trace").length;
  told.titles = [...document.querySelectorAll("#plot .xtitle, #plot .ytitle")].map((title) => title.textContent);
  told.cells = document.querySelectorAll("#heat-maps td[style]").length;
  told.front = [...document.querySelectorAll("#table tr.front")].map((row) => row.dataset.number);
  const heading = [...document.querySelectorAll("#table thead button")].find((button) => button.textContent === "read/step");
  heading.click(); told.up = names();
  heading.click(); told.down = names();
  document.querySelectorAll("#choose-x input")[2].click(); document.querySelectorAll("#choose-y input")[1].click();
  told.switched = [...document.querySelectorAll("#plot .xtitle, #plot .ytitle")].map((title) => title.textContent);
  told.wide = document.documentElement.scrollWidth - window.innerWidth;
  told.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const box = document.createElement("pre"); box.id = "told"; box.textContent = JSON.stringify(told); document.body.append(box);
});
</script></body>"""


NARROW = """<iframe src="index.html" style="width: 390px; height: 900px"></iframe><pre id="told"></pre><script>
window.addEventListener("load", () => setTimeout(() => {
  const inner = document.querySelector("iframe").contentDocument;
  const plot = inner.querySelector("#plot svg.main-svg").getBoundingClientRect();
  const name = inner.querySelector("#table tbody th").getBoundingClientRect();
  const told = { page: inner.documentElement.scrollWidth, plot: plot.right, name: name.width };
  document.getElementById("told").textContent = JSON.stringify(told);
}, 1000));
</script>"""


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser logged."""
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=10000",
        "--window-size=1280,1600", "--allow-file-access-from-files",
    )  # fmt: skip
    command = [BROWSER, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def told_by(page: Path, profile: Path) -> tuple[dict[str, Any], str]:
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    document, log = browse(page, profile)
    found = re.search(r'<pre id="told">(.*?)</pre>', document, re.S)
    assert found, f"the page's scripts stopped early: {log}"
    return json.loads(unescape(found[1])), log


@needs_browser
def test_a_browser_shows_plot_and_heat_maps_without_network_or_errors(tmp_path: Path) -> None:
    rows = sample.results()
    page = report.write_report(sample.write_results(tmp_path / "report"))
    told, log = told_by(page, tmp_path / "profile")
    assert log == "", "errors or refused requests in the console"
    assert told["requests"] == [], "the page asks for nothing"
    assert told["traces"] == 1 + 1 + len(sample.METHODS)  # the front, dense, the methods
    assert told["titles"] == ["bytes read per decode step", "accuracy (the answer is contained)"]
    assert told["cells"] == 15 * len(rows)
    assert told["wide"] <= 0, "nothing hangs out of the window"

    reads = [row["bytes_read"] for row in rows]
    best = [
        i for i, row in enumerate(rows)
        if not any(
            other["bytes_read"] <= reads[i] and other["quality"] >= row["quality"]
            and (other["bytes_read"], -other["quality"], j) < (reads[i], -row["quality"], i)
            for j, other in enumerate(rows)
        )
    ]  # fmt: skip
    assert sorted(map(int, told["front"])) == best
    up = sorted(range(1, len(rows)), key=lambda i: (reads[i], i))
    assert list(map(int, told["up"])) == [0, *up], "dense stays on top"
    assert list(map(int, told["down"])) == [0, *sorted(up, key=lambda i: (-reads[i], i))]
    assert told["switched"] == ["decode time per token", "fidelity (same next token as dense)"]


@needs_browser
def test_a_browser_shows_perplexity_and_names_that_look_like_markup(tmp_path: Path) -> None:
    rows = [{**row, "quality": 10 / (0.01 + row["quality"]), "quality_name": "perplexity"} for row in sample.results()[:9]]
    rows[1] |= {"method": "<b>x</b>", "budget": "<i>", "cells": [], "kept_share": None}
    page = report.write_report(sample.write_results(tmp_path / "report", rows))
    told, log = told_by(page, tmp_path / "profile")
    assert log == "" and told["requests"] == [] and told["titles"][1] == "perplexity (lower is better)"


@needs_browser
def test_a_phone_can_show_it(tmp_path: Path) -> None:
    rows = sample.results()
    for row in rows[-4:]:
        row["method"] = "snapkv(kernel=5, window=64):20% + tokenselect(refresh=0.8, per_head=True)"
    report.write_report(sample.write_results(tmp_path, rows))
    frame = tmp_path / "frame.html"
    frame.write_text(NARROW, encoding="utf-8")
    document, log = browse(frame, tmp_path / "profile")
    told = json.loads(unescape(re.search(r'<pre id="told">(.*?)</pre>', document, re.S)[1]))
    assert log == "" and told["page"] <= 390 and told["plot"] <= 390 and told["name"] >= 90


def test_more_methods_than_colours_stay_apart(quick, tmp_path: Path) -> None:
    rows = [{**sample.results()[1], "method": f"m{i}", "recipe": f"m{i}"} for i in range(20)]
    html = page_of(tmp_path, rows)
    assert [method["style"] for method in plot_of(html)["methods"]] == [str(i) for i in range(20)]
    assert set(re.findall(r'class="swatch style-(\w+)"', html)) == {str(i) for i in range(8)}
