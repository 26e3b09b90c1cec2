"""Laconic: every decision about tokens in a transformer behind one interface. Compare, choose, apply, serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laconic.budget import Budget
from laconic.errors import LaconicError
from laconic.method import Method
from laconic.recipe import Recipe
from laconic.registry import get, methods, register

if TYPE_CHECKING:
    from laconic.evaluation.compare import compare
    from laconic.evaluation.tune import tune
    from laconic.generation import generate
    from laconic.hooks import Handle, apply
    from laconic.models import load

__version__ = "0.1.0"
__all__ = [
    "Budget", "Handle", "LaconicError", "Method", "Recipe", "apply", "compare", "generate", "get", "load", "methods", "register",
    "tune",
]  # fmt: skip

_HEAVY = {
    "Handle": "laconic.hooks", "apply": "laconic.hooks", "compare": "laconic.evaluation.compare", "load": "laconic.models",
    "generate": "laconic.generation", "tune": "laconic.evaluation.tune",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is first used, so that ``import laconic`` stays quick."""
    if name not in _HEAVY:
        raise AttributeError(f"module 'laconic' has no attribute '{name}'")
    import importlib

    value = getattr(importlib.import_module(_HEAVY[name]), name)
    globals()[name] = value
    return value
