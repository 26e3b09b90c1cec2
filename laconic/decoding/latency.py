"""What a forward costs by the number of tokens that it computes."""

from __future__ import annotations

import statistics
import time

import torch

from laconic.decoding.runner import Runner
from laconic.decoding.tree import TreeShape
from laconic.hooks import apply

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
CONTEXT, REPEATS = 256, 5


@torch.inference_mode()
def forward_seconds(model: torch.nn.Module, rows: tuple[int, ...] = ROWS) -> list[tuple[int, float]]:
    """Median time of forwards of ``rows`` tokens behind a text of 256, or half of what the model can hold, on this machine."""
    with apply(model, "dense") as handle:
        runner, found = Runner(handle), []
        room = (runner.limit or 4 * CONTEXT) // 2
        runner.prefill({"input_ids": torch.ones(1, min(CONTEXT, room), dtype=torch.int64, device=model.device)})
        for count in (count for count in rows if count <= room // 2):
            times = []
            for _ in range(REPEATS + 1):  # the first is for warming up
                begun = time.perf_counter()
                output = runner.run(torch.ones(1, count, dtype=torch.int64, device=model.device), TreeShape.chain(count - 1))
                output.logits[0, -1, 0].item()  # the device may run behind
                times.append(time.perf_counter() - begun)
                runner.settle(torch.full((1, 0), 0))
            found.append((count, round(statistics.median(times[1:]), 6)))
    return found
