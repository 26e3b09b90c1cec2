"""What stands in for a function of a module, for as long as anybody takes part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WRAPPED = "_laconic_wrapped"  # in a module: by name of a function of its own, who takes part, and what stood there before


def join(module: torch.nn.Module, name: str, member: Any, stand_in: Callable[[Callable, list[Any]], Callable]) -> None:
    """``member`` takes part in what stands in for a function of a module, ``stand_in(original, members)``.

    It is put there with the first member, and the last one that leaves takes it away: members come and go in any order.
    """
    wrapped = module.__dict__.setdefault(WRAPPED, {})
    if name not in wrapped:
        wrapped[name] = [], module.__dict__.get(name)
        module.__dict__[name] = stand_in(getattr(module, name), wrapped[name][0])
    wrapped[name][0].append(member)


def leave(module: torch.nn.Module, name: str, member: Any) -> None:
    """Undoes ``join``."""
    wrapped = module.__dict__[WRAPPED]
    members, before = wrapped[name]
    members.remove(member)
    if members:
        return
    del wrapped[name], module.__dict__[name]
    if before is not None:
        module.__dict__[name] = before
    if not wrapped:
        del module.__dict__[WRAPPED]
