"""What drafting gains: ``laconic compare --suite decoding``.

Every method runs on every workload, temperature and batch size, in turns with plain decoding of the same prompts.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from laconic.budget import Budget
from laconic.decoding.base import DraftMethod
from laconic.decoding.engine import Decoded, decode, drafting, per_forward
from laconic.decoding.runner import left_padded
from laconic.decoding.sampling import Sampling
from laconic.errors import LaconicError
from laconic.evaluation.drafting_texts import TEXTS, prompts
from laconic.evaluation.examples import Example, Task
from laconic.evaluation.measure import Item, prepare, stop_ids
from laconic.evaluation.plan import Cell, display_name
from laconic.evaluation.progress import Advance
from laconic.evaluation.provenance import identify
from laconic.evaluation.results import ResultStore, prepare_directory
from laconic.evaluation.session import Outcome, Session, length_notes, written
from laconic.evaluation.task_file import read_task
from laconic.evaluation.workload import check_options, open_model
from laconic.method import Method
from laconic.models.reading import text_side
from laconic.recipe import Recipe
from laconic.registry import find
from laconic.registry import methods as catalogue

if TYPE_CHECKING:
    from rich.table import Table

SAMPLES, NEW_TOKENS, LENGTH = 2, 48, 256
TEMPERATURES, BATCHES = (0.0, 1.0), (1, 8)
WARM = 6  # tokens that are written before times are taken


@dataclass(frozen=True)
class DraftCell(Cell):
    """A recipe that drafts on one workload at one temperature, ``batch`` prompts at a time."""

    workload: str
    temperature: float
    batch: int

    @property
    def place(self) -> dict[str, Any]:
        """The columns that tell the rows of a recipe apart."""
        return {"task": self.workload, "temperature": self.temperature, "batch": self.batch}


@dataclass
class DecodingReport(Outcome):
    """What the suite found. ``rows``: one dict per recipe, workload, temperature and batch size."""

    def table(self) -> Table:
        """The rows as a rich table, workloads side by side."""
        from laconic.evaluation.decoding_report import build_table

        return build_table(self.rows)


@dataclass(frozen=True)
class Workload:
    """Prompts to continue. ``ends``: tokens that end a text; none where a fixed number of tokens is written."""

    name: str
    items: list[Item]
    ends: frozenset[int] = frozenset()
    problems: list[str] = field(default_factory=list)

    def batches(self, samples: int, batch: int) -> list[list[Item]]:
        """The prompts in groups of ``batch``; with too few for one group they come again."""
        wanted = max(samples, batch)
        items = [self.items[i % len(self.items)] for i in range(-(-wanted // batch) * batch)]
        return [items[i : i + batch] for i in range(0, len(items), batch)]


def decoding_suite(
    model: str | tuple[Any, Any] = "story",
    *,
    methods: Sequence[str | Method | Recipe] | None = None,
    budgets: Sequence[str | int | Budget] | None = None,
    workloads: Sequence[str] | None = None,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    length: int | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    batches: Sequence[int] = BATCHES,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    output: str | Path = "laconic-report",
    overwrite: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> DecodingReport:
    """Measures what drafting gains over plain decoding, and writes ``results.jsonl``, ``run.json`` and ``index.html``.

    Args:
        model: the name of a built-in model, a path, a hub id, or ``(model, tokenizer)``.
        methods: names, or recipes with one method that drafts ("tokenselect:256 + token_recycling"), which are compared with
            themselves without it. By default every method that drafts; one that lacks something here is noted.
        budgets: tokens drafted in each forward; by default each method's own.
        workloads: prose, code and repetitive, and paths of JSONL files with prompts. Files alone come on top of the three.
        samples: prompts of each workload; a batch takes as many as it has rows.
        max_new_tokens: new tokens of each; by default 48, of a file its own.
        length: tokens of the built-in prompts, 256 by default, or less for a model with few positions.
        temperatures, batches: what is run; 0 is greedy, and then texts are compared token by token.
        output: the report directory. A run that was interrupted goes on where it stopped; ``overwrite`` starts afresh.
        command: how the report says it was made; by default this call.

    Raises:
        LaconicError: for anything that the user can mend, in one sentence.
    """
    check_options(question="seen", samples=samples, max_new_tokens=max_new_tokens)
    _check_grid(temperatures, batches)
    planned, left_out = plan_drafts(methods, budgets)
    directory = Path(output)
    prepare_directory(directory)
    network, reader, model_id = open_model(model, device, dtype)
    samples = samples or SAMPLES
    loaded = _open_workloads(network, reader, workloads, max(samples, *batches), max_new_tokens, length, seed)
    items = [item for workload in loaded for item in workload.items]
    task = Task(" + ".join(workload.name for workload in loaded), None, [])
    settings = {"suite": "decoding", "seed": seed, "max_new_tokens": max_new_tokens, "samples": samples}
    identity = identify(network, model_id, task, items, settings)
    command = command or f"decoding_suite({model_id!r}, output={str(output)!r})"
    cells = [
        DraftCell(cell.name, cell.budget, cell.recipe, workload.name, float(temperature), batch)
        for temperature in temperatures for batch in batches for workload in loaded for cell in planned
    ]  # fmt: skip
    with ResultStore(directory, identity, overwrite=overwrite) as store:
        session = _Suite(network, reader, cells, loaded, samples, store, command)
        for name, error in left_out:
            session.leave_out(name, error)
        return session.measure(progress)


def _check_grid(temperatures: Sequence[float], batches: Sequence[int]) -> None:
    if not temperatures or not all(0 <= temperature < float("inf") for temperature in temperatures):
        raise LaconicError("Temperatures are numbers of 0 or more, such as 0,1: give at least one.")
    if not batches or not all(batch >= 1 for batch in batches):
        raise LaconicError("Batches are whole numbers of 1 or more, such as 1,8: give at least one.")


def plan_drafts(
    methods: Sequence[str | Method | Recipe] | None, budgets: Sequence[str | int | Budget] | None
) -> tuple[list[Cell], list[tuple[str, LaconicError]]]:
    """The recipes to run, each once, and those of the catalogue that cannot be made without parameters, with the reason."""
    chosen = list(methods or [row["id"] for row in catalogue() if issubclass(find(row["id"]), DraftMethod)])
    cells: list[Cell] = []
    left_out: list[tuple[str, LaconicError]] = []
    for entry in chosen:
        try:
            cells += _sized(entry, [Budget.parse(size) for size in budgets or ()])
        except LaconicError as error:
            if methods:
                raise
            left_out.append((str(entry), error))
    if not cells and left_out:
        raise left_out[0][1]
    return list({cell.key: cell for cell in cells}.values()), left_out


def _sized(entry: str | Method | Recipe, sizes: Sequence[Budget]) -> list[Cell]:
    """One entry at every budget; where it brings its own, or none is given, at that."""
    recipe = Recipe.parse(entry)
    method = drafting(recipe)
    if method is None:
        raise LaconicError(f"{recipe} drafts nothing: name methods of the stage draft, such as token_recycling.")
    own = not isinstance(entry, str) or ":" in next(p for p in entry.split("+") if method.id in p).rsplit(")")[-1]
    found = []
    for size in [method.budget] if own or not sizes else sizes:
        parts = tuple(dataclasses.replace(m, budget=size) if m is method else m for m in recipe.methods)
        sized = Recipe(parts)
        found.append(Cell(display_name(sized), str(size), sized))
    return found


def _open_workloads(
    network: Any, reader: Any, names: Sequence[str] | None, count: int, limit: int | None, length: int | None, seed: int
) -> list[Workload]:
    """The built-in texts and the user's own."""
    chosen = list(dict.fromkeys(names or ()))
    files = [name for name in chosen if name.endswith((".jsonl", ".ndjson"))]
    for name in chosen:
        if name not in TEXTS and name not in files:
            raise LaconicError(f"There is no workload '{name}': use {', '.join(TEXTS)}, or FILE.jsonl with prompts.")
    if len(files) == len(chosen):
        chosen = [*TEXTS, *files]
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    new = limit or NEW_TOKENS
    size = length or min(LENGTH, max(1, (positions - new) // 2) if positions else LENGTH)
    tokenizer = text_side(reader)
    found = []
    for name in chosen:
        if name in files:
            task = read_task(name, tokenizer, count)
            items = prepare(task.examples, reader, max_new_tokens=limit)
            problems = [f"{task.name}: {problem}" for problem in task.problems]
            found.append(Workload(task.name, items, frozenset(stop_ids(network, tokenizer)), problems))
        else:
            examples = [Example(text, max_new_tokens=new) for text in prompts(name, tokenizer, count, size, seed)]
            found.append(Workload(name, prepare(examples, tokenizer)))
    return found


@dataclass
class _Sum:
    """Figures of several runs, added up."""

    tokens: int = 0
    steps: int = 0
    nodes: int = 0
    rows: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    draft_bytes: int = 0
    accepted: Counter[int] = field(default_factory=Counter)

    def add(self, run: Decoded) -> None:
        self.tokens += sum(len(row) - 1 for row in run.rows)  # the first new token is the prompt's own
        self.steps += run.forwards - 1
        self.nodes += run.nodes
        self.rows += (run.forwards - 1) * len(run.rows)
        self.prefill_s += run.prefill_s
        self.decode_s += run.decode_s
        self.draft_s += run.draft_s
        self.draft_bytes = max(self.draft_bytes, run.draft_bytes)
        self.accepted.update(dict(enumerate(run.accepted)))

    @property
    def per_token(self) -> float | None:
        return self.decode_s / self.tokens if self.tokens else None

    @property
    def histogram(self) -> list[int]:
        return [self.accepted[count] for count in range(max(self.accepted, default=-1) + 1)]

    @property
    def tokens_per_forward(self) -> float | None:
        return per_forward(self.histogram)


class _Suite(Session):
    outcome = DecodingReport

    def __init__(
        self, network: Any, reader: Any, cells: list[DraftCell], workloads: list[Workload], samples: int, store: ResultStore,
        command: str,
    ) -> None:  # fmt: skip
        notes = [problem for workload in workloads for problem in workload.problems]
        items = [item for workload in workloads for item in workload.items]
        super().__init__(network, cells, store, command, [*notes, *length_notes(network, items)])
        self.workloads, self.samples = {workload.name: workload for workload in workloads}, samples
        self.pad = text_side(reader).pad_token_id or 0
        self.device = next(network.parameters()).device
        self.header |= {
            "suite": "decoding",
            "task": {"name": " + ".join(self.workloads), "metric": None, "examples": samples},
            "methods": list(dict.fromkeys(cell.name for cell in cells)),
            "budgets": list(dict.fromkeys(cell.budget for cell in cells)),
            "workloads": list(self.workloads),
        }

    def finished(self, cell: DraftCell) -> dict[str, Any] | None:
        return self.store.finished(cell.key, **cell.place)

    def cost(self, todo: Sequence[DraftCell]) -> int:
        return sum(max(item.limit for item in group) for cell in todo for group in self._groups(cell))

    def work(self, todo: Sequence[DraftCell], advance: Advance) -> None:
        warm: set[tuple[str, int]] = set()
        failed: dict[str, LaconicError] = {}
        for cell in todo:
            try:
                if (cell.key, cell.batch) not in warm:
                    self._warm_up(cell)
                    warm.add((cell.key, cell.batch))
                row = self._measure(cell, lambda tokens, cell=cell: advance(f"{cell.label} {cell.workload}", tokens))
            except LaconicError as error:
                failed[cell.key] = error
                self.leave_out(cell.key, error)
                continue
            self.store.append(row)
        if failed and not self.store.rows:
            raise next(iter(failed.values()))

    def write_page(self) -> Path:
        from laconic.evaluation.decoding_report import write_decoding_report

        return written(write_decoding_report, self.store.directory)

    def _groups(self, cell: DraftCell) -> list[list[Item]]:
        return self.workloads[cell.workload].batches(self.samples, cell.batch)

    def _warm_up(self, cell: DraftCell) -> None:
        """Compiles what will be timed."""
        group = self._groups(cell)[0]
        for recipe in (plain_of(cell.recipe), cell.recipe):
            decode(self.network, self._inputs(group), recipe, max_new_tokens=WARM, sampling=Sampling(cell.temperature))

    def _measure(self, cell: DraftCell, advance: Callable[[int], None]) -> dict[str, Any]:
        """The row of a cell. Plain and drafted runs take turns, so that whatever else the machine does reaches both."""
        workload, recipes = self.workloads[cell.workload], {"plain": plain_of(cell.recipe), "drafted": cell.recipe}
        sums, equal, texts = {name: _Sum() for name in recipes}, 0, 0
        for number, group in enumerate(self._groups(cell)):
            runs, limit = {}, max(item.limit for item in group)
            for name in sorted(recipes, reverse=bool(number % 2)):
                runs[name] = decode(
                    self.network, self._inputs(group), recipes[name], max_new_tokens=limit, ends=workload.ends,
                    sampling=Sampling(cell.temperature), seed=self.store.identity["seed"] + number,
                )  # fmt: skip
                sums[name].add(runs[name])
                runs[name].drafter = None  # its tables are not needed any more
            equal += sum(a == b for a, b in zip(runs["plain"].rows, runs["drafted"].rows, strict=True))
            texts += len(group)
            advance(limit)
        plain, drafted = sums["plain"], sums["drafted"]
        known = plain.per_token is not None and drafted.per_token is not None
        return {
            "method": cell.name,
            "recipe": cell.key,
            "budget": cell.budget,
            **cell.place,
            "guarantee": drafting(cell.recipe).promise,
            "texts": texts,
            "equal": equal if cell.temperature == 0 else None,
            "exact": equal == texts if cell.temperature == 0 else None,
            "tokens": drafted.tokens,
            "forwards": drafted.steps,
            "plain_forwards": plain.steps,
            "tokens_per_forward": drafted.tokens_per_forward,
            "nodes_per_forward": drafted.nodes / drafted.rows if drafted.rows else None,
            "accepted": drafted.histogram,
            "prefill_s": drafted.prefill_s / texts,
            "decode_s": drafted.per_token,
            "plain_s": plain.per_token,
            "speedup": plain.per_token / drafted.per_token if known else None,
            "draft_share": drafted.draft_s / drafted.decode_s if drafted.decode_s else None,
            "draft_bytes": drafted.draft_bytes,
        }

    def _inputs(self, group: Sequence[Item]) -> dict[str, torch.Tensor]:
        """The prompts of a batch, padded on the left."""
        if any("pixel" in name for item in group for name in item.inputs):
            if len(group) > 1:
                raise LaconicError("prompts with pictures are continued one at a time here: use --batches 1.")
            inputs = {"input_ids": torch.tensor([group[0].ids]), **group[0].inputs}
            return {name: value.to(self.device) for name, value in inputs.items()}
        return left_padded([item.ids for item in group], self.device, self.pad)


def plain_of(recipe: Recipe) -> Recipe:
    """The same without drafts."""
    rest = tuple(method for method in recipe.methods if method is not drafting(recipe))
    return Recipe(rest) if rest else Recipe.parse("dense")
