"""Fewer forwards: drafting and verification, parallel and diffusion decoding, controlled sampling."""

from __future__ import annotations

from typing import Any

__all__ = ["custom_generate", "decode"]
_HOMES = {"custom_generate": "laconic.decoding.custom", "decode": "laconic.decoding.engine"}


def __getattr__(name: str) -> Any:
    """Imported when first used: the catalogue imports this package, and needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module 'laconic.decoding' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
