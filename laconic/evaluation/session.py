"""What comparisons share: cells that are measured one by one, each on disk before the next, until a page is written."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laconic.errors import LaconicError
from laconic.evaluation.measure import Item
from laconic.evaluation.progress import Advance, progress_bar
from laconic.evaluation.provenance import machine
from laconic.evaluation.results import ResultStore


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during long work; the message says what is kept and how to go on."""


@dataclass
class Outcome:
    """What a comparison found. ``rows``: one dict per cell. ``path``: the directory. ``html``: the page."""

    path: Path
    rows: list[dict[str, Any]]
    run: dict[str, Any]
    html: Path | None = None
    notes: list[str] = field(default_factory=list)


class Session:
    """The loop over the cells that are not on disk yet. A subclass says what a cell is, what it costs, and how it is measured."""

    outcome: type[Outcome] = Outcome

    def __init__(self, network: Any, cells: Sequence[Any], store: ResultStore, command: str, notes: Sequence[str]) -> None:
        self.network, self.cells, self.store, self.notes = network, list(cells), store, [*notes, *store.problems]
        identity = store.identity
        self.header: dict[str, Any] = {
            "command": command,
            "versions": identity["versions"],
            "machine": machine(next(network.parameters()).device),
            "model": {
                "id": identity["model"],
                "architecture": type(network).__name__,
                "parameters": sum(p.numel() for p in network.parameters()),
                "dtype": identity["dtype"],
            },
            "seed": identity["seed"],
            "skipped": [],
            "notes": self.notes,
            "started": store.started or now(),
            "finished": None,
        }

    def finished(self, cell: Any) -> dict[str, Any] | None:
        """The row of a cell that is on disk."""
        return self.store.finished(cell.key)

    def cost(self, todo: Sequence[Any]) -> int:
        """Tokens that the cells go through: the unit of the progress bar."""
        raise NotImplementedError

    def work(self, todo: Sequence[Any], advance: Advance) -> None:
        """Measures the cells and puts their rows into the store."""
        raise NotImplementedError

    def write_page(self) -> Path:
        """The page of what is on disk."""
        raise NotImplementedError

    def measure(self, progress: bool) -> Any:
        """Measures the cells that are not on disk yet, then writes the page."""
        self.store.write_header(self.header)
        training = self.network.training
        self.network.eval()
        todo = [cell for cell in self.cells if self.finished(cell) is None]
        try:
            with progress_bar(progress, self.cost(todo), "dense") as advance:
                self.work(todo, advance)
        except KeyboardInterrupt:
            with contextlib.suppress(LaconicError):  # a page of what is there, if there is room for it
                self.write_page()
            raise Interrupted(self._how_to_resume()) from None
        finally:
            self.network.train(training)
        self.header["finished"] = now()
        self.store.write_header(self.header)
        rows = [row for cell in self.cells if (row := self.finished(cell))]
        return self.outcome(self.store.directory, rows, self.header, self.write_page(), self.notes)

    def leave_out(self, name: str, reason: LaconicError) -> None:
        """Notes that a cell cannot be measured, and why; the same once only."""
        entry = {"recipe": name, "reason": str(reason)}
        if entry not in self.header["skipped"]:
            self.header["skipped"].append(entry)
            self.notes.append(f"{name} was left out: {reason}")

    def _how_to_resume(self) -> str:
        done = sum(self.finished(cell) is not None for cell in self.cells)
        return (
            f"Interrupted: {done} of {len(self.cells)} cells are kept in {self.store.directory}; "
            "run the same command again to go on."
        )


def length_notes(network: Any, items: Sequence[Item]) -> list[str]:
    """A warning where examples are longer than the model was made for."""
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(item.ids) + item.limit for item in items)
    if not limit or longest <= limit:
        return []
    return [f"The longest example takes {longest} tokens with its answer; the model was made for {limit}."]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def written(write: Callable[[Path], Path], directory: Path) -> Path:
    """Calls ``write``; a full disk is said in a sentence."""
    try:
        return Path(write(directory))
    except OSError as error:
        raise LaconicError(
            f"Cannot write the page in {directory} ({error.strerror or error}): the results are kept in results.jsonl; "
            "make room and run the same command again."
        ) from error
