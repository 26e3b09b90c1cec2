"""How much attention every key receives in prefill, against summing eager attention maps."""

from __future__ import annotations

import torch

from laconic import kernels
from laconic.bench.figure import Figure, Say, interleave, milliseconds, peak
from laconic.bench.steps import Shape

GOAL = ">= 3x faster than eager attention maps, in <= 5 % of the map's bytes"
RATIO, MEMORY_SHARE, TOLERANCE = 3.0, 0.05, 1e-4


def run(quick: bool, say: Say) -> Figure:
    """Median of interleaved passes over one layer of two heads (the map of 32 takes 34 GB), and the peak of each."""
    shape = Shape(512 if quick else 16_384, heads=2, kv_heads=1)
    repeats = 2 if quick else 3
    generator = torch.Generator().manual_seed(0)
    keys, _ = shape.filled(generator)
    query = torch.randn(1, shape.heads, shape.tokens, shape.head_dim, generator=generator)
    mask = torch.full((shape.tokens, shape.tokens), torch.finfo(torch.float32).min).triu_(1)

    def eager(_: int) -> torch.Tensor:
        return eager_column_sums(query, keys, mask, shape.scale)

    def ours(_: int) -> torch.Tensor:
        return kernels.column_sums(query, keys, scale=shape.scale)

    times = interleave({"eager": eager, "ours": ours}, repeats=repeats, say=say)
    (found, used, source), (expected, eager_peak, _) = peak(ours), peak(eager)
    difference = float(((found - expected).abs() / expected.clamp(min=1e-3)).max())
    ms, map_bytes = milliseconds(times), 4 * shape.heads * shape.tokens**2
    share = used / map_bytes
    return Figure(
        ours=ms["ours"],
        reference=ms["eager"],
        target=RATIO,
        unit="ms",
        conditions={"memory": share <= MEMORY_SHARE, "same_output": difference <= TOLERANCE},
        detail={
            "tokens": shape.tokens,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "dtype": "float32",
            "map_bytes": map_bytes,
            "share_of_map_bytes": share,
            "peak_bytes": {"ours": used, "eager": eager_peak},
            "memory_source": source,
            "largest_relative_difference": difference,
            "repeats": repeats,
            "reference": "repeat keys, matmul, additive mask (made before), fp32 softmax, sum over rows; no values",
        },
    )


def eager_column_sums(query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Sums ``(1, heads, n)`` of the maps that eager attention makes of ``query`` (1, heads, n, head_dim)."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    logits = query @ keys.transpose(2, 3) * scale
    logits = logits + mask
    return logits.softmax(-1, dtype=torch.float32).sum(2)
