"""Pictures of the documentation: SVG files that are the same for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laconic.errors import LaconicError


def subplots(*grid: int, **options: Any) -> tuple[Any, Any]:
    """matplotlib's ``pyplot.subplots``, set up for these files. Raises LaconicError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise LaconicError("Pictures need matplotlib: pip install 'laconic[docs]'.") from error

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "laconic", "font.size": 9})
    from matplotlib import pyplot

    return pyplot.subplots(*grid, **options)


def save(figure: Any, path: Path) -> None:
    """Writes a figure and lets go of it."""
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
