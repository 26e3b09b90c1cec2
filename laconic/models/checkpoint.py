"""What a training command leaves behind: the weights, and beside them the state to go on from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

RESUME = "resume.pt"


def save(model: Any, out: Path, **state: Any) -> None:
    """Writes the weights in bf16, and ``state`` with the weights as they are trained; a stop meanwhile spoils neither."""
    torch.save({"model": model.state_dict(), **state}, out / "resume.tmp")
    (out / "resume.tmp").replace(out / RESUME)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)


def saved_state(out: Path) -> dict[str, Any] | None:
    """What ``save`` left in a folder; None where there is nothing."""
    return torch.load(out / RESUME) if (out / RESUME).exists() else None
