"""Two answers of a method for its report, one right and one wrong, beside what was expected and what dense said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RIGHT = 0.5  # scores such as ROUGE-L lie between 0 and 1
LONGEST = 400  # characters of an answer that are shown
_HIDDEN = ("end", "line")  # settings that give the answer away, or say nothing to a reader


def pick_answers(rows: Sequence[dict[str, Any]], dense: dict[str, Any], metric: str | None) -> list[dict[str, Any]]:
    """At most two: the first right and the first wrong answer, of the smallest budget that has one.

    ``rows``: those of one method, as in results.jsonl; ``dense``: the reference row, or empty.
    """
    ordered = sorted(rows, key=lambda row: row.get("kept_share") or 0)
    answers = [
        (row, number, cell)
        for row in ordered
        for number, cell in enumerate(row.get("cells") or [])
        if cell.get("correct") is not None
    ]
    picked = []
    for right in (True, False):
        found = next((answer for answer in answers if (answer[2]["correct"] >= RIGHT) == right), None)
        if found:
            picked.append(_answer(*found, dense=dense, right=right, metric=metric))
    return picked


def _answer(
    row: dict[str, Any], number: int, cell: dict[str, Any], *, dense: dict[str, Any], right: bool, metric: str | None
) -> dict[str, Any]:
    meta = cell.get("meta") or {}
    peers = dense.get("cells") or []
    peer = peers[number] if row is not dense and number < len(peers) else {}
    settings = [f"{key} {_short(value, 40)}" for key, value in meta.items() if key not in _HIDDEN]
    return {
        "right": right,
        "where": ", ".join([f"budget {row.get('budget')}", f"example {number + 1}", *settings]),
        "expected": _expected(meta, cell.get("answer")),
        "said": _short(cell.get("prediction"), LONGEST),
        "dense": None if peer.get("prediction") is None else _short(peer["prediction"], LONGEST),
        "score": f"{cell['correct']:.2f}" if metric == "rouge_l" else None,
    }


def _expected(meta: dict[str, Any], answer: Any) -> str:
    """The answer as a reader knows it: where a pattern is matched, its task says what the pattern stands for."""
    wanted = meta.get("end", answer)
    return _short(" or ".join(map(str, wanted)) if isinstance(wanted, list) else wanted, LONGEST)


def _short(value: Any, limit: int) -> str:
    text = " ".join(str("" if value is None else value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
