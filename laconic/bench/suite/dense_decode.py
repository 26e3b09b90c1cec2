"""The exact decode step of one layer, against transformers' sdpa attention and DynamicCache."""

from __future__ import annotations

import torch

from laconic.bench.bandwidth import ReadStep
from laconic.bench.figure import Figure, Say, interleave, milliseconds
from laconic.bench.steps import OurStep, Shape, StockStep

GOAL = ">= 8x faster than sdpa + DynamicCache, and >= 70 % of the measured read bandwidth"
RATIO, BANDWIDTH_SHARE, TOLERANCE = 8.0, 0.7, 1e-5


def run(quick: bool, say: Say) -> Figure:
    """Median of interleaved steps; both append the same token and answer the same query, and the answers must agree.

    A plain read of the same memory takes its turn too: the bandwidth of the machine under the very same load.
    """
    shape, repeats = (Shape(2048), 2) if quick else (Shape(65_536), 9)
    generator = torch.Generator().manual_seed(0)
    keys, values = shape.filled(generator)
    incoming = shape.incoming(repeats + 3, generator)
    stock = StockStep(shape, keys, values, incoming)
    ours = OurStep(shape, keys, values, incoming, "dense")
    read = ReadStep(ours.layer.keys, ours.layer.values)
    del keys, values
    times = interleave({"stock": stock, "ours": ours, "read": read}, repeats=repeats, warmup=2, say=say)
    difference = float((stock(repeats + 2) - ours(repeats + 2)).abs().max())
    ms = milliseconds(times)
    limit, reached = read.bytes / (1e-3 * ms["read"]), shape.cache_bytes / (1e-3 * ms["ours"])
    return Figure(
        ours=ms["ours"],
        reference=ms["stock"],
        target=RATIO,
        unit="ms",
        conditions={"bandwidth": reached >= BANDWIDTH_SHARE * limit, "same_output": difference <= TOLERANCE},
        detail={
            **shape.describe(),
            "bandwidth_share": reached / limit,
            "bandwidth_reached": reached,
            "bandwidth_measured": limit,
            "largest_difference": difference,
            "repeats": repeats,
            "best_ms": {name: 1e3 * min(values) for name, values in times.items()},
        },
    )
