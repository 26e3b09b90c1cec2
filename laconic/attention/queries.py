"""The newest queries of a text, kept from one call of attention to the next."""

from __future__ import annotations

from typing import Any

import torch


def join_queries(memory: dict[str, Any], name: str, new: torch.Tensor, keep: int) -> torch.Tensor:
    """The ``new`` queries (batch, heads, any, head_dim) behind those of earlier calls; remembers the last ``keep`` at least.

    What is remembered lies in ``memory`` under ``name``, with room for as many again, so that most steps write in place.
    """
    held, count = memory.get(name), memory.get(name + ".count", 0)
    end = count + new.shape[2]
    if held is not None and end <= held.shape[2]:
        held[:, :, count:end] = new
        memory[name + ".count"] = end
        return held[:, :, :end]
    queries = new if held is None else torch.cat([held[:, :, max(0, count - keep) : count], new], dim=2)
    tail = queries[:, :, -keep:]
    memory[name] = torch.nn.functional.pad(tail, (0, 0, 0, 2 * keep - tail.shape[2]))
    memory[name + ".count"] = tail.shape[2]
    return queries
