"""How a method fares while a long text is written: fidelity and cache, block of generated tokens by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laconic.evaluation.measure import Item, Trace
    from laconic.recipe import Recipe

BLOCKS = 16
SHORTEST = 16  # tokens of a block: the fidelity of fewer is mostly noise
BARS = "▁▂▃▄▅▆▇█"


def along(items: Sequence[Item], traces: Sequence[Trace], recipe: Recipe, layers: int) -> dict[str, Any] | None:
    """Means over the examples, one per block of generated tokens; None where fewer than four blocks are generated.

    Returns:
        ``size``: tokens per block. ``fidelity``, ``kl``; ``kept``: entries attended to; ``bytes_kept``: bytes held;
        ``of_budget``: entries attended to over the tokens that the budget allows (None for a recipe without a budget), and
        ``holds``: whether it stays at that. A read method that now and then reads everything does not, nor does one that
        cuts the prompt only.
    """
    longest = max(len(trace.forced) for trace in traces)
    size = max(SHORTEST, math.ceil(longest / BLOCKS))
    if longest < 4 * SHORTEST:
        return None
    budgets = [budget_tokens(recipe, item.prefill, layers) for item in items]
    rows = [_example_blocks(*pair, size) for pair in zip(traces, budgets, strict=True) if len(pair[0].forced) > 1]
    blocks: dict[str, Any] = {"size": size}
    for name in ("fidelity", "kl", "kept", "bytes_kept", "of_budget"):
        blocks[name] = [_mean(values) for values in _columns([row[name] for row in rows])]
    blocks["holds"] = None
    if all(budget is None for budget in budgets):
        blocks["of_budget"] = None
    else:  # shares are rounded up, layer by layer
        blocks["holds"] = max(blocks["of_budget"]) <= 1 + 1 / min(budget for budget in budgets if budget)
    return blocks


def budget_tokens(recipe: Recipe, prompt: int, layers: int) -> float | None:
    """Tokens that a recipe may attend to per KV head, mean over the layers: the smallest budget of its methods."""
    found = []
    for method in recipe.methods:
        if not method.budget.is_full:
            # A number of tokens does not depend on the prompt; a share is one of the prompt, not of what is written.
            n = prompt if method.budget.share is not None else 2 * (method.budget.amount or 0)
            found.append(sum(method.budget.tokens(n, layer=i, layers=layers) for i in range(layers)) / layers)
    return min(found, default=None)


def _example_blocks(trace: Trace, budget: float | None, size: int) -> dict[str, list[float]]:
    """One example: means per block. The first token comes from the prefill, which is no merit of the method."""
    kept = [step["kept"] for step in trace.stats]
    series: dict[str, list[Any]] = {
        "fidelity": trace.agrees[1:],
        "kl": trace.kls[1:],
        "kept": kept,
        "bytes_kept": [step["bytes_kept"] for step in trace.stats],
        "of_budget": [value / budget for value in kept] if budget else [],
    }
    return {name: [_mean(values[i : i + size]) for i in range(0, len(values), size)] for name, values in series.items()}


def _columns(rows: Sequence[Sequence[float]]) -> Iterator[list[float]]:
    """The n-th values of all rows that are so long."""
    for i in range(max(map(len, rows), default=0)):
        yield [row[i] for row in rows if i < len(row)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def lowest(rows: Sequence[dict[str, Any]]) -> float | None:
    """The lowest fidelity of a block in all rows, where the curves begin; None where no row has blocks."""
    return min((value for row in rows for value in (row.get("blocks") or {}).get("fidelity", [])), default=None)


def sparkline(values: Sequence[float], low: float = 0.0, width: int = 8) -> str:
    """Values between ``low`` and 1 as bars, neighbours averaged to at most ``width``."""
    step = math.ceil(len(values) / width)
    means = [_mean(values[i : i + step]) for i in range(0, len(values), step)]
    top, span = len(BARS) - 1, (1 - low) or 1.0
    return "".join(BARS[min(top, max(0, round((value - low) / span * top)))] for value in means)


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What the page shows of the blocks: per recipe two polylines, in a box of 1 x 1 with y down, and texts; or None.

    Fidelity runs from the lowest block of all rows to 1, entries attended to from 0 to the most that any recipe with a
    budget attends to, as a multiple of its budget.
    """
    floor = lowest(rows)
    if floor is None:
        return None
    shown = [row for row in rows if row.get("blocks")]
    most = max([1.0, *(value for row in shown for value in row["blocks"]["of_budget"] or [])])
    lines = []
    for row in shown:
        blocks = row["blocks"]
        fidelity, used = blocks["fidelity"], blocks["of_budget"]
        lines.append({
            "row": row,
            "fidelity": _polyline(fidelity, floor, 1.0),
            "first": fidelity[0],
            "last": fidelity[-1],
            "used": _polyline(used, 0.0, most) if used else None,
            "peak": max(used) if used else None,
            "holds": blocks["holds"],
            "cache": (blocks["bytes_kept"][0], blocks["bytes_kept"][-1]),
        })  # fmt: skip
    size = max(row["blocks"]["size"] for row in shown)
    return {"lines": lines, "floor": floor, "most": most, "size": size, "budget": 1 - 1 / most}


def _polyline(values: Sequence[float], low: float, high: float) -> str:
    """``x,y x,y``, the first value at x = 0 and the last at x = 1."""
    last, span = max(1, len(values) - 1), (high - low) or 1.0
    return " ".join(f"{i / last:.3f},{1 - (value - low) / span:.3f}" for i, value in enumerate(values))
