"""Our greedy coverage and apricot's facility location side by side: the same tokens, in one run.

    pip install apricot-select scikit-learn
    python benchmarks/apricot_side_by_side.py > apricot.json

Both pick a tenth of 2,880 made-up image tokens of width 1,024, so that all tokens are covered as well as possible by cosine. The
matrix of cosines, made once, is given to both. apricot offers several searches for the same greedy set; of the rules of this
library it has this one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from laconic.bench.run import machine
from laconic.primitives.greedy import CoverageRule, greedy_order

SEARCHES = ("naive", "lazy", "two-stage")


def main() -> None:
    """Prints one JSON object: milliseconds, ratios, and whether the same tokens were picked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2880)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    count = options.tokens // 10
    features = torch.randn(options.tokens, options.width, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features, dim=-1)
    cosines = (unit @ unit.T).clamp(min=0)

    def ours() -> list[int]:
        return greedy_order(cosines[None], torch.tensor([count]), CoverageRule())[0].tolist()

    steps: dict[str, Callable[[], list[int]]] = {"ours": ours}
    steps |= {f"apricot {search}": lambda search=search: peer(cosines, count, search) for search in SEARCHES}
    steps["cosines"] = lambda: (unit @ unit.T).shape
    picked = {name: step() for name, step in steps.items()}  # compiles
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begun))
    ms = {name: statistics.median(values) for name, values in times.items()}
    fastest = min((f"apricot {search}" for search in SEARCHES), key=ms.__getitem__)
    print(json.dumps(outcome(options, count, ms, fastest, picked), indent=2))


def peer(cosines: torch.Tensor, count: int, search: str) -> list[int]:
    """What apricot picks, in the order of picking."""
    from apricot import FacilityLocationSelection

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FacilityLocationSelection(count, metric="precomputed", optimizer=search).fit(cosines.numpy()).ranking.tolist()


def outcome(
    options: argparse.Namespace, count: int, ms: dict[str, float], fastest: str, picked: dict[str, Any]
) -> dict[str, Any]:
    """What the script prints."""
    same = {name: picked[name] == picked["ours"] for name in picked if name.startswith("apricot")}
    return {
        "tokens": options.tokens, "width": options.width, "picked": count, "ms": ms, "fastest_peer": fastest,
        "ratio": ms[fastest] / ms["ours"], "share_of_cosines": ms["ours"] / ms["cosines"], "same_order": same,
        "machine": machine(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
