"""What the tokens of a picture receive of a vision encoder's attention, against eager attention maps."""

from __future__ import annotations

import torch

from laconic.bench.figure import Figure, Say, interleave, milliseconds, peak
from laconic.vision.encoder import Trace, Want

GOAL = ">= 3x faster than eager attention maps, in <= 5 % of the map's bytes, for the class token and for all patches"
RATIO, MEMORY_SHARE, TOLERANCE = 3.0, 0.05, 1e-4
KINDS = ("cls", "received")


def run(quick: bool, say: Say) -> Figure:
    """Median of interleaved passes over one block of 16 heads of 64, as in CLIP's large encoder; the headline is ``received``."""
    patches, heads, width, repeats = (120, 2, 16, 2) if quick else (2880, 16, 64, 5)
    generator = torch.Generator().manual_seed(0)
    query, key = (2 * torch.randn(1, heads, 1 + patches, width, generator=generator) for _ in range(2))
    tower = torch.nn.Module()
    tower.class_embedding = torch.nn.Parameter(torch.zeros(1))  # what says that the first token is none of the patches
    tower.blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])

    def ours(kind: str) -> torch.Tensor:
        want, trace = Want(kind, 0), Trace(tower, frozenset())
        trace.record(want, query, key, width**-0.5)
        return trace.found[want][0]

    def eager(kind: str) -> torch.Tensor:
        attention = (query @ key.mT * width**-0.5).softmax(-1)
        return attention.mean(1)[:, 0, 1:] if kind == "cls" else attention.mean(1).sum(1)[:, 1:]

    both = {"eager": eager, "ours": ours}
    steps = {f"{name} {kind}": lambda _, f=f, kind=kind: f(kind) for kind in KINDS for name, f in both.items()}
    ms = milliseconds(interleave(steps, repeats=repeats, say=say))
    map_bytes, rows = 4 * heads * (1 + patches) ** 2, {}
    for kind in KINDS:
        (found, used, source), (expected, eager_used, _) = (peak(steps[f"{name} {kind}"]) for name in ("ours", "eager"))
        rows[kind] = {
            "ms": ms[f"ours {kind}"], "eager_ms": ms[f"eager {kind}"], "ratio": ms[f"eager {kind}"] / ms[f"ours {kind}"],
            "share_of_map_bytes": used / map_bytes, "eager_share_of_map_bytes": eager_used / map_bytes, "memory_source": source,
            "largest_relative_difference": float(((found - expected).abs() / expected.clamp(min=1e-6)).max()),
        }  # fmt: skip
    return Figure(
        ours=rows["received"]["ms"],
        reference=rows["received"]["eager_ms"],
        target=RATIO,
        unit="ms",
        conditions={
            "class_token": rows["cls"]["ratio"] >= RATIO,
            "memory": all(row["share_of_map_bytes"] <= MEMORY_SHARE for row in rows.values()),
            "same_output": all(row["largest_relative_difference"] <= TOLERANCE for row in rows.values()),
        },
        detail={"patches": patches, "heads": heads, "head_dim": width, "map_bytes": map_bytes, "rows": rows, "repeats": repeats},
    )
