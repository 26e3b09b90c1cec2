"""The printed table: figures for people, and ratios to dense."""

from __future__ import annotations

import io

import pytest

from laconic.evaluation import table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (15_360, "15.4 KB"),
        (999_900, "1.00 MB"),
        (2.5e11, "250 GB"),
    ],
)
def test_size(count: float | None, text: str) -> None:
    assert table.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (2.5, "2.50 s"), (0.0123, "12.3 ms"), (0.9999, "1.00 s"), (5e-6, "5.00 µs")]
)
def test_seconds(value: float | None, text: str) -> None:
    assert table.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "dense", "text"),
    [(1, 2, "×0.50"), (None, 2, ""), (1, 0, ""), (1, None, ""), (0, 2, "×0.00"), (25, 2, "×12.5"), (2000, 2, "×1000")],
)
def test_ratio(value: float | None, dense: float | None, text: str) -> None:
    assert table.ratio(value, dense) == text


def row(method: str, budget: str, **changes: object) -> dict:
    figures = dict.fromkeys(("bytes_kept", "bytes_read", "peak_bytes"), 123_456_789)
    figures |= {"prefill_s": 0.0123, "decode_s": 0.00456}
    base = {"method": method, "budget": budget, "quality": 1.0, "quality_name": "contains", "fidelity": 1.0, "kl": 0.01}
    return base | figures | changes


RUN = {"model": {"id": "needle"}, "task": {"name": "needle", "examples": 15}}


def shown(rows: list[dict], *, ratios: bool, width: int) -> list[str]:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(table.build_table(rows, RUN, ratios=ratios))
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("ratios", "width"), [(True, 120), (False, 80)])
def test_nothing_is_cut_off_at_the_promised_width(ratios: bool, width: int) -> None:
    lines = shown([row("dense", "100%"), row("recycled_attention", "50%")], ratios=ratios, width=width)
    text = "\n".join(lines)
    assert "…" not in text and "peak" in text and "12.3 ms" in text and "4.56 ms" in text
    assert ("×1.00" in text) == ratios == ("recycled_attention" in text)


def test_a_task_without_answers_has_no_quality_column() -> None:
    blank = {"quality": None, "quality_name": None}
    text = "\n".join(shown([row("dense", "100%", **blank), row("h2o", "5%", **blank)], ratios=True, width=120))
    assert "contains" not in text and "fidelity" in text


@pytest.mark.parametrize(("ratios", "width"), [(True, 120), (False, 80)])
def test_pairs_have_a_column_where_a_prompt_was_shortened(ratios: bool, width: int) -> None:
    rows = [row("dense", "100%", pairs=1.0), row("token_sparse_attention", "25%", pairs=0.377)]
    lines = shown(rows, ratios=ratios, width=width)
    text = "\n".join(lines)
    assert "pairs" in lines[1] and "0.38" in text and "…" not in text
    assert "pairs" not in "\n".join(shown([rows[0], row("h2o", "5%", pairs=1.0)], ratios=ratios, width=width))


def test_long_names_are_folded_not_cut_and_brackets_are_no_markup() -> None:
    name = "tokenselect(refresh=0.5,int8=True,per_head=True)[red]"
    lines = shown([row("dense", "100%"), row(name, "5%")], ratios=True, width=120)
    width = lines[1].index("budget") - 1
    assert name in "".join(line[:width].strip() for line in lines)
