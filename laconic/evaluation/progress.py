"""The progress bar of long work, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[str, int], None]


@contextlib.contextmanager
def progress_bar(show: bool, total: int, label: str) -> Iterator[Advance]:
    """A bar that counts tokens up to ``total``; yields ``advance(label, tokens)``."""
    if not show or not total:
        yield lambda label, tokens: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:<26}", markup=False), progress.BarColumn(), progress.TaskProgressColumn(),
        progress.TextColumn("[dim]elapsed"), progress.TimeElapsedColumn(),
        progress.TextColumn("[dim]left"), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        handle = bar.add_task(label, total=total)
        yield lambda label, tokens: bar.update(handle, description=label, advance=tokens)
