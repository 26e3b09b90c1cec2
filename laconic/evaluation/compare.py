"""The main job: methods x budgets on a task, each cell with quality, fidelity, bytes, time and memory beside dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.budget import Budget
from laconic.errors import LaconicError
from laconic.evaluation import measure
from laconic.evaluation.gallery import FILE as GALLERY
from laconic.evaluation.gallery import write_gallery
from laconic.evaluation.plan import Cell, plan
from laconic.evaluation.progress import Advance
from laconic.evaluation.provenance import identify
from laconic.evaluation.quality import share_kept
from laconic.evaluation.results import ResultStore, prepare_directory
from laconic.evaluation.session import Outcome, Session, length_notes, written
from laconic.evaluation.workload import Work, check_options, default_task, open_model, open_work
from laconic.method import GUARANTEES, Method
from laconic.models.reading import sees
from laconic.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Report(Outcome):
    """What ``compare`` found. ``rows``: one dict per cell, dense first. ``path``: the directory. ``html``: the page."""

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


class _Run(Session):
    """Cells of a recipe at a budget, on all examples of one task, the dense one first."""

    outcome = Report

    def __init__(
        self, network: Any, tokenizer: Any, cells: list[Cell], work: Work, store: ResultStore, command: str
    ) -> None:
        super().__init__(network, cells, store, command, [*work.notes, *length_notes(network, work.items)])
        self.task, self.reader = work, tokenizer
        self.runner = measure.Runner(network, tokenizer)
        self.header |= {
            "task": {"name": work.task.name, "metric": work.metric, "examples": len(work.items)},
            "question": store.identity["question"],
            "methods": list(dict.fromkeys(cell.name for cell in cells)),
            "budgets": list(dict.fromkeys(cell.budget for cell in cells)),
        }

    def cost(self, todo: Sequence[Cell]) -> int:
        return len(todo) * sum(item.cost for item in self.task.items)

    def work(self, todo: Sequence[Cell], advance: Advance) -> None:
        self._measure(list(todo), advance)
        pictured = any(item.example.pictures for item in self.task.items)
        if pictured and (todo or not (self.store.directory / GALLERY).exists()):
            write_gallery(self.store.directory, self.runner, self.reader, self.task.items, self.cells)

    def write_page(self) -> Path:
        return _write_page(self.store.directory)

    def _measure(self, todo: list[Cell], advance: Advance) -> None:
        if not todo:
            return
        dense, warm = self.cells[0], set()
        if dense not in todo:  # its row is on disk, but what the others are compared with is not
            todo = [dense, *todo]
        for cell in todo:
            try:
                if cell.name not in warm:
                    measure.warm_up(self.runner, self.task.items[0], cell.recipe)
                    warm.add(cell.name)
                row = self._cell(cell, advance)
            except LaconicError as error:
                if cell is dense:
                    raise
                self.leave_out(cell.key, error)
                continue
            if self.store.finished(cell.key) is None:
                self.store.append(row)
        if len(self.header["skipped"]) == len(self.cells) - 1 > 0:
            raise LaconicError(self.header["skipped"][0]["reason"])

    def _cell(self, cell: Cell, advance: Advance) -> dict[str, Any]:
        measured = measure.measure_cell(
            self.runner, self.task.items, self.task.metric, cell.recipe, lambda tokens: advance(cell.label, tokens)
        )
        weakest = max((method.guarantee for method in cell.recipe.methods), key=GUARANTEES.index)
        names = {"method": cell.name, "recipe": cell.key, "budget": cell.budget, "task": self.task.task.name}
        return {**names, "guarantee": weakest, **measured}


def _write_page(directory: Path) -> Path:
    from laconic.evaluation.report import write_report

    return written(write_report, directory)
