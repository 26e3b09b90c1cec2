"""The kernels on the CPU, in numba: every key and value is read once, from wherever it lies."""

from __future__ import annotations

import torch

from laconic.kernels.cpu_attention import decode_attention, selected_attention
from laconic.kernels.cpu_blocks import logits
from laconic.kernels.cpu_greedy import greedy, most_isolated
from laconic.kernels.cpu_scores import column_sums, topk, vote
from laconic.kernels.simd import HAS_HALF

DTYPES = (torch.float32, torch.bfloat16, *([torch.float16] if HAS_HALF else []))

__all__ = ["DTYPES", "column_sums", "decode_attention", "greedy", "logits", "most_isolated", "selected_attention", "topk", "vote"]
