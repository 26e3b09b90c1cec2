"""The main job: methods x budgets on a task, each cell with quality, fidelity, bytes, time and memory beside dense."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.budget import Budget
from laconic.errors import LaconicError
from laconic.evaluation import measure
from laconic.evaluation.gallery import FILE as GALLERY
from laconic.evaluation.gallery import write_gallery
from laconic.evaluation.plan import Cell, plan
from laconic.evaluation.progress import Advance, progress_bar
from laconic.evaluation.provenance import identify, machine
from laconic.evaluation.quality import share_kept
from laconic.evaluation.results import ResultStore, prepare_directory
from laconic.evaluation.workload import Work, check_options, default_task, open_model, open_work
from laconic.method import GUARANTEES, Method
from laconic.models.reading import sees
from laconic.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table

@dataclass
class Report:
    """What ``compare`` found. ``rows``: one dict per cell, dense first. ``path``: the directory. ``html``: the page."""

    path: Path
    rows: list[dict[str, Any]]
    run: dict[str, Any]
    html: Path | None = None
    notes: list[str] = field(default_factory=list)

    def table(self, *, ratios: bool = True) -> Table:
        """The rows as a rich table, each figure with its ratio to dense."""
        from laconic.evaluation.table import build_table

        return build_table(self.rows, self.run, ratios=ratios)

    def best(self, keep: float = 0.99, cost: str = "bytes_read") -> dict[str, Any] | None:
        """The cheapest row that keeps the share ``keep`` of the dense quality, or None.

        Quality is the task's (for perplexity, lower is better), or the fidelity where the task has no answers. ``cost``
        is any numeric column: bytes_read, bytes_kept, decode_s, peak_bytes, ...
        """
        dense = next(row for row in self.rows if row["method"] == "dense")
        candidates = [row for row in self.rows if row.get(cost) is not None and share_kept(row, dense) >= keep]
        return min(candidates, key=lambda row: row[cost], default=None)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; the message says what is kept and how to go on."""


def compare(
    model: str | tuple[Any, Any] = "needle",
    *,
    methods: Sequence[str | Method | Recipe] | str | None = None,
    budgets: Sequence[str | int | Budget] | str | None = None,
    task: str | None = None,
    samples: int | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    question: str = "seen",
    max_new_tokens: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    output: str | Path = "laconic-report",
    overwrite: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> Report:
    """Measures methods x budgets on a task and writes ``results.jsonl``, ``run.json`` and ``index.html`` to ``output``.

    Args:
        model: the name of a built-in model, a path, a hub id, or ``(model, tokenizer)``.
        methods: names, recipes ("tokenselect:256" brings its own budget) or methods. Dense is always measured.
        budgets: tokens (256) or shares kept (10%); each name in ``methods`` runs at each.
        task: needle, multi_needle, threads, kv_recall, perplexity[:FILE], long_generation[:FILE], with pictures shapes_vqa or
            pope, or the path of a JSONL file; by default needle, or shapes_vqa for a model that sees. Where 64 tokens and more
            are generated, rows also say how fidelity and cache fare along the text.
        samples: number of examples in all. lengths: prompt lengths in tokens (built-in tasks).
        seed: of the task's examples and of methods that draw numbers.
        question: ``seen`` prefills the whole prompt; ``after`` prefills the context only, so that what is evicted in
            prefill is chosen without having seen the question.
        max_new_tokens: overrides the examples' own limit (for perplexity: the scored tokens).
        device: where a model given by name is loaded; by default a GPU if there is one.
        dtype: as what it is loaded; by default as stored.
        output: the report directory. A run that was interrupted goes on where it stopped; ``overwrite`` starts afresh.
        command: how the report says it was made; by default this call.

    Raises:
        LaconicError: for anything that the user can mend, in one sentence.
    """
    check_options(question=question, samples=samples, max_new_tokens=max_new_tokens)
    plan(methods or "dense", budgets)  # what is wrong with them is said before a model is loaded
    directory = Path(output)
    prepare_directory(directory)
    network, tokenizer, model_id = open_model(model, device, dtype)
    cells = plan(methods, budgets, pictures=sees(tokenizer))
    task = task or default_task(tokenizer)
    work = open_work(
        task, tokenizer, samples=samples, lengths=lengths, seed=seed, question=question, max_new_tokens=max_new_tokens
    )
    settings = {"seed": seed, "question": question, "max_new_tokens": max_new_tokens}
    identity = identify(network, model_id, work.task, work.items, settings)
    command = command or f"laconic.compare({model_id!r}, task={task!r}, output={str(output)!r})"
    with ResultStore(directory, identity, overwrite=overwrite) as store:
        return _Run(network, tokenizer, cells, work, store, command).measure(progress)


class _Run:
    """The loop over the cells, with everything it needs."""

    def __init__(
        self, network: Any, tokenizer: Any, cells: list[Cell], work: Work, store: ResultStore, command: str
    ) -> None:
        self.cells, self.work, self.store, self.reader = cells, work, store, tokenizer
        self.runner = measure.Runner(network, tokenizer)
        self.notes = [*work.notes, *store.problems, *_length_notes(network, work.items)]
        identity = store.identity
        self.header: dict[str, Any] = {
            "command": command,
            "versions": identity["versions"],
            "machine": machine(self.runner.device),
            "model": {
                "id": identity["model"],
                "architecture": type(network).__name__,
                "parameters": sum(p.numel() for p in network.parameters()),
                "dtype": identity["dtype"],
            },
            "task": {"name": work.task.name, "metric": work.metric, "examples": len(work.items)},
            "seed": identity["seed"],
            "question": identity["question"],
            "methods": list(dict.fromkeys(cell.name for cell in cells)),
            "budgets": list(dict.fromkeys(cell.budget for cell in cells)),
            "skipped": [],
            "notes": self.notes,
            "started": store.started or now(),
            "finished": None,
        }

    def measure(self, progress: bool) -> Report:
        """Measures the cells that are not on disk yet, then writes the page."""
        self.store.write_header(self.header)
        network = self.runner.model
        training = network.training
        network.eval()
        todo = [cell for cell in self.cells if self.store.finished(cell.key) is None]
        try:
            total = len(todo) * sum(item.cost for item in self.work.items)
            with progress_bar(progress, total, "dense") as advance:
                self._measure(todo, advance)
            pictured = any(item.example.pictures for item in self.work.items)
            if pictured and (todo or not (self.store.directory / GALLERY).exists()):
                write_gallery(self.store.directory, self.runner, self.reader, self.work.items, self.cells)
        except KeyboardInterrupt:
            with contextlib.suppress(LaconicError):  # a page of what is there, if there is room for it
                _write_page(self.store.directory)
            raise Interrupted(self._how_to_resume()) from None
        finally:
            network.train(training)
        self.header["finished"] = now()
        self.store.write_header(self.header)
        rows = [row for cell in self.cells if (row := self.store.finished(cell.key))]
        return Report(self.store.directory, rows, self.header, _write_page(self.store.directory), self.notes)

    def _measure(self, todo: list[Cell], advance: Advance) -> None:
        if not todo:
            return
        dense, warm = self.cells[0], set()
        if dense not in todo:  # its row is on disk, but what the others are compared with is not
            todo = [dense, *todo]
        for cell in todo:
            try:
                if cell.name not in warm:
                    measure.warm_up(self.runner, self.work.items[0], cell.recipe)
                    warm.add(cell.name)
                row = self._cell(cell, advance)
            except LaconicError as error:
                if cell is dense:
                    raise
                self.header["skipped"].append({"recipe": cell.key, "reason": str(error)})
                self.notes.append(f"{cell.key} was left out: {error}")
                continue
            if self.store.finished(cell.key) is None:
                self.store.append(row)
        if len(self.header["skipped"]) == len(self.cells) - 1 > 0:
            raise LaconicError(self.header["skipped"][0]["reason"])

    def _cell(self, cell: Cell, advance: Advance) -> dict[str, Any]:
        measured = measure.measure_cell(
            self.runner, self.work.items, self.work.metric, cell.recipe, lambda tokens: advance(cell.label, tokens)
        )
        weakest = max((method.guarantee for method in cell.recipe.methods), key=GUARANTEES.index)
        names = {"method": cell.name, "recipe": cell.key, "budget": cell.budget, "task": self.work.task.name}
        return {**names, "guarantee": weakest, **measured}

    def _how_to_resume(self) -> str:
        done = sum(self.store.finished(cell.key) is not None for cell in self.cells)
        return (
            f"Interrupted: {done} of {len(self.cells)} cells are kept in {self.store.directory}; "
            "run the same command again to go on."
        )


def _length_notes(network: Any, items: list[measure.Item]) -> list[str]:
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(item.ids) + item.limit for item in items)
    if not limit or longest <= limit:
        return []
    return [f"The longest example takes {longest} tokens with its answer; the model was made for {limit}."]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write_page(directory: Path) -> Path:
    from laconic.evaluation.report import write_report

    try:
        return Path(write_report(directory))
    except OSError as error:
        raise LaconicError(
            f"Cannot write the page in {directory} ({error.strerror or error}): the results are kept in results.jsonl; "
            "make room and run the same command again."
        ) from error
