"""Drafting, against transformers' own decoding of the same model, in one run; prints one JSON object.

    python benchmarks/decoding.py --output decoding.json
    python benchmarks/decoding.py --model PATH_OR_HUB_ID --draft PATH_OR_HUB_ID --parts peers

Three parts:

- ``peers``: plain decoding, every method that drafts, and transformers' ``generate``: plain, with ``prompt_lookup_num_tokens``
  and with ``assistant_model``. Times are of whole calls, the prompt included, in turns, the median of ``--repeats``; beside the
  wall's stands the processor's time, which says more on a machine that others use too. ``pairs`` has ours beside theirs.
- ``replay``: what drafts are worth where the forward is dear. Every forward of the model also pays one of a slice of the
  Llama-3.2-1B shape (random weights, 4 of its 16 layers, its whole output layer) with the same number of tokens: the model's own
  text and acceptance, the time of the larger one.
- ``costs``: a forward of a draft tree against a step of one token, and what settling and forking the cache cost, for the model
  and for the slice.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from laconic.bench.figure import interleave
from laconic.bench.llama_slice import build_slice, cache_argument, fill, stock_cache
from laconic.decoding.base import DraftMethod
from laconic.decoding.engine import decode
from laconic.decoding.runner import Runner
from laconic.decoding.sampling import Sampling
from laconic.decoding.tree import TreeShape
from laconic.errors import LaconicError
from laconic.evaluation.drafting_texts import TEXTS, prompts
from laconic.evaluation.provenance import machine, shell_command, versions
from laconic.evaluation.results import dumps
from laconic.hooks import apply
from laconic.models import load
from laconic.models.reading import text_side
from laconic.recipe import Recipe
from laconic.registry import find, get, methods

PARTS = ("peers", "replay", "costs")
PEERS = {  # theirs: the same thing of ours, as far as it is there
    "transformers": "plain", "transformers prompt lookup": "prompt_lookup", "transformers assisted": "speculative",
}  # fmt: skip
LOOKUP = 8  # tokens that both prompt lookups draft
NODES = (1, 2, 4, 8, 16, 24, 32, 64)


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    samples: int = 2
    new: int = 64
    length: int = 256
    repeats: int = 5
    batches: tuple[int, ...] = (1, 8)
    workloads: tuple[str, ...] = tuple(TEXTS)
    nodes: tuple[int, ...] = NODES


QUICK = Sizes(samples=1, new=8, length=32, batches=(1, 2), workloads=("repetitive",), nodes=(1, 4))


@dataclass
class Count:
    """Forwards of a model, counted by a hook."""

    forwards: int = 0

    def __call__(self, *arguments: Any) -> None:
        self.forwards += 1


@dataclass
class Written:
    """What a contender made of all prompts: new tokens of each, and forwards of the target model."""

    rows: list[list[int]] = field(default_factory=list)
    forwards: int = 0
    batches: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Of a row, after the prompt's forward."""
        return (len(self.rows[0]) - 1) * self.batches / (self.forwards - self.batches)


def drafters(model: Any, draft: str | None) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Every method of the catalogue that can draft for the model, by name, and why others are left out.

    ``draft``: for those that take a model.
    """
    found, left_out = {}, {}
    for row in methods():
        cls = find(row["id"])
        if not issubclass(cls, DraftMethod):
            continue
        takes_model = any(f.name == "model" for f in dataclasses.fields(cls))
        try:
            recipe = Recipe((get(cls.id, **({"model": draft} if takes_model and draft else {})),))
            decode(model, {"input_ids": torch.ones(1, 2, dtype=torch.int64)}, recipe, max_new_tokens=2)
            found[cls.id] = recipe
        except LaconicError as error:
            left_out[cls.id] = str(error)
    if "prompt_lookup" in found:
        found["prompt_lookup"] = Recipe((get("prompt_lookup", budget=LOOKUP),))
    return found, left_out


def batches_of(tokenizer: Any, name: str, batch: int, sizes: Sizes) -> list[dict[str, torch.Tensor]]:
    """Prompts of one length, ``batch`` at a time."""
    groups = -(-sizes.samples // batch)
    texts = prompts(name, tokenizer, groups * batch, sizes.length, seed=0)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    least = min(map(len, rows))
    ids = torch.tensor([row[:least] for row in rows])
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch)]


# --- peers


def our_contender(model: Any, recipe: Recipe, prompts: list[dict], temperature: float, new: int) -> Callable[[], Written]:
    def run() -> Written:
        written = Written()
        for inputs in prompts:
            out = decode(model, {"input_ids": inputs["input_ids"]}, recipe, max_new_tokens=new, sampling=Sampling(temperature))
            written.rows += out.rows
            written.forwards += out.forwards
            written.batches += 1
        return written

    return run


def their_contender(
    model: Any, prompts: list[dict], temperature: float, new: int, count: Count, **options: Any
) -> Callable[[], Written]:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def run() -> Written:
        written = Written()
        for inputs in prompts:
            count.forwards = 0
            torch.manual_seed(0)
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=new, **sampling, **options)
            written.rows += out[:, inputs["input_ids"].shape[1] :].tolist()
            written.forwards += count.forwards
            written.batches += 1
        return written

    return run


@contextlib.contextmanager
def endless(*models: Any) -> Iterator[None]:
    """Nothing ends a text early, so that all write the same number of tokens."""
    saved = [(model, model.generation_config) for model in models]
    for model in models:
        model.generation_config = copy.deepcopy(model.generation_config)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = model.generation_config.pad_token_id or 0
    try:
        yield
    finally:
        for model, config in saved:
            model.generation_config = config


def peers(model: Any, tokenizer: Any, recipes: dict[str, Recipe], draft: Any, sizes: Sizes, say: Any) -> list[dict[str, Any]]:
    """One row per contender, workload, temperature and batch; what cannot be run has its error in the place of figures."""
    count = Count()
    hook = model.register_forward_pre_hook(count)
    rows = []
    try:
        with endless(*filter(None, (model, draft))):
            for temperature in (0.0, 1.0):
                for batch in sizes.batches:
                    for name in sizes.workloads:
                        say(f"peers: {name}, temperature {temperature:g}, batch {batch}")
                        prompts_ = batches_of(tokenizer, name, batch, sizes)
                        place = {"workload": name, "temperature": temperature, "batch": batch}
                        contenders = _contenders(model, recipes, draft, prompts_, temperature, sizes.new, count)
                        rows += [{"name": key, **place, **row} for key, row in _race(contenders, temperature, sizes).items()]
    finally:
        hook.remove()
    return rows


def _contenders(
    model: Any, recipes: dict[str, Recipe], draft: Any, prompts_: list[dict], temperature: float, new: int, count: Count
) -> dict[str, Callable[[], Written]]:
    ours = {"plain": Recipe.parse("dense"), **recipes}
    theirs: dict[str, dict[str, Any]] = {
        "transformers": {}, "transformers prompt lookup": {"prompt_lookup_num_tokens": LOOKUP},
    }  # fmt: skip
    if draft is not None:
        theirs["transformers assisted"] = {"assistant_model": draft}
    return {
        **{name: their_contender(model, prompts_, temperature, new, count, **options) for name, options in theirs.items()},
        **{name: our_contender(model, recipe, prompts_, temperature, new) for name, recipe in ours.items()},
    }


def _race(contenders: dict[str, Callable[[], Written]], temperature: float, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Each once, to see that it runs and what it writes; then all in turns, for the times."""
    written: dict[str, Written] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, run in contenders.items():
        try:
            written[name] = run()
        except (LaconicError, ValueError, NotImplementedError, RuntimeError) as error:
            rows[name] = {"error": " ".join(str(error).split())}
    processor: dict[str, list[float]] = {name: [] for name in written}

    def step(name: str) -> None:
        start = time.process_time()
        contenders[name]()
        processor[name].append(time.process_time() - start)

    taken = interleave({name: (lambda i, name=name: step(name)) for name in written}, repeats=sizes.repeats, warmup=0)
    times, cpu = ({name: statistics.median(values) for name, values in of.items()} for of in (taken, processor))
    reference = written["transformers"].rows
    for name, made in written.items():
        rows[name] = {
            "tokens_per_forward": made.tokens_per_forward,
            "seconds_per_token": times[name] / sum(map(len, made.rows)),
            "cpu_seconds_per_token": cpu[name] / sum(map(len, made.rows)),
            "against_transformers": times["transformers"] / times[name],
            "same_ids": made.rows == reference if temperature == 0 else None,
        }
    return {name: rows[name] for name in contenders}


def pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours beside the same of theirs; ``ratio``: their time over ours, ``cpu_ratio``: their processor time over ours; None where
    theirs does not run."""
    found = {(row["name"], row["workload"], row["temperature"], row["batch"]): row for row in rows}
    made = []
    for (name, *place), row in found.items():
        mine = found.get((PEERS.get(name), *place))
        if mine is None or "error" in mine:
            continue
        ratio, cpu = (
            None if "error" in row else row[name] / mine[name] for name in ("seconds_per_token", "cpu_seconds_per_token")
        )
        where = dict(zip(("workload", "temperature", "batch"), place, strict=True))
        made.append({"theirs": name, "ours": PEERS[name], **where, "ratio": ratio, "cpu_ratio": cpu, "error": row.get("error")})
    return made


# --- replay


class Burden:
    """A hook that lets every forward of a model also pay one of a larger model, with as many tokens, over as long a text."""

    def __init__(self, large: Any, context: int) -> None:
        self.large, self.cache, self.context = large, stock_cache(large.config), context
        self.argument = cache_argument(large)
        fill(large.config, context, [self.cache])

    def __call__(self, module: Any, arguments: tuple, named: dict[str, Any]) -> None:
        given = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        ids = torch.zeros(given.shape[:2], dtype=torch.int64)
        prefill = "logits_to_keep" in named
        cache = {} if prefill else {self.argument: self.cache}
        with torch.inference_mode():
            self.large(ids, use_cache=not prefill, logits_to_keep=1 if prefill else 0, **cache)
        if not prefill:
            self.cache.crop(-ids.shape[1])


def replay(model: Any, tokenizer: Any, recipes: dict[str, Recipe], large: Any, sizes: Sizes, say: Any) -> list[dict[str, Any]]:
    """Greedy, one prompt at a time: time per token after the prompt, with the larger model's forwards paid."""
    burden = Burden(large, sizes.length)
    hook = model.register_forward_pre_hook(burden, with_kwargs=True)
    rows = []
    try:
        for name in sizes.workloads:
            plain: float | None = None
            inputs = batches_of(tokenizer, name, 1, dataclasses.replace(sizes, samples=1))[0]
            for key, recipe in {"plain": Recipe.parse("dense"), **recipes}.items():
                say(f"replay: {name}, {key}")
                try:
                    out = decode(model, {"input_ids": inputs["input_ids"]}, recipe, max_new_tokens=sizes.new)
                except LaconicError as error:
                    rows.append({"name": key, "workload": name, "error": str(error)})
                    continue
                per_token = out.decode_s / (len(out.rows[0]) - 1)
                plain = plain or per_token
                rows.append({
                    "name": str(recipe), "workload": name, "tokens_per_forward": out.tokens_per_forward,
                    "seconds_per_token": per_token, "against_plain": plain / per_token,
                    "draft_share": out.draft_s / out.decode_s,
                })  # fmt: skip
    finally:
        hook.remove()
    return rows


# --- costs


def costs(model: Any, name: str, sizes: Sizes, repeats: int = 7) -> dict[str, Any]:
    """Milliseconds of a tree's forward by its nodes (a chain, all kept but half), of settling it, and of a fork of the cache."""
    forwards, settles, forks = {}, {}, []
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(vocabulary, shape, generator=generator)

    with torch.inference_mode(), apply(model, "dense") as handle:
        runner = Runner(handle)
        runner.prefill({"input_ids": tokens(1, sizes.length)})
        for nodes in sizes.nodes:
            taken: list[tuple[float, float]] = []
            for _ in range(repeats):
                start = time.perf_counter()
                if nodes == 1:
                    runner.step(tokens(1))
                    taken.append((time.perf_counter() - start, 0.0))
                else:
                    runner.run(tokens(1, nodes), TreeShape.chain(nodes - 1))
                    middle = time.perf_counter()
                    runner.settle(torch.tensor([[0, *range(2, nodes, 2)]]))
                    taken.append((middle - start, time.perf_counter() - middle))
                before = time.perf_counter()
                fork = runner.cache.fork()
                forks.append(time.perf_counter() - before)
                runner.cache.restore(fork)
            forwards[str(nodes)] = 1e3 * statistics.median(first for first, _ in taken)
            settles[str(nodes)] = 1e3 * statistics.median(second for _, second in taken)
    one = forwards[str(sizes.nodes[0])]
    return {
        "model": name, "context": sizes.length, "forward_ms": forwards, "of_one": {n: ms / one for n, ms in forwards.items()},
        "settle_ms": settles, "fork_ms": 1e3 * statistics.median(forks),
    }  # fmt: skip


def run(
    model: str, draft: str | None, parts: Sequence[str], names: Sequence[str], sizes: Sizes, quick: bool, say: Any
) -> dict[str, Any]:
    """Everything that was asked for; ``names``: the only methods that draft, empty for all."""
    network, reader = load(model)
    tokenizer = text_side(reader)
    assistant = load(draft)[0] if draft else None
    recipes, left_out = drafters(network, draft)
    recipes = {name: recipe for name, recipe in recipes.items() if not names or name in names}
    result: dict[str, Any] = {
        "model": model, "dtype": str(network.dtype), "draft": draft, "machine": machine(), "versions": versions(),
        "sizes": dataclasses.asdict(sizes), "quick": quick, "left_out": left_out,
    }  # fmt: skip
    large = build_slice(quick) if set(parts) & {"replay", "costs"} else None
    if "peers" in parts:
        result["peers"] = peers(network, tokenizer, recipes, assistant, sizes, say)
        result["pairs"] = pairs(result["peers"])
    if "replay" in parts:
        result["replay"] = replay(network, tokenizer, recipes, large, sizes, say)
    if "costs" in parts:
        say("costs")
        result["costs"] = [costs(network, model, sizes), costs(large, "4 layers of Llama-3.2-1B's shape", sizes)]
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="by default story, with --quick needle")
    parser.add_argument("--draft", default=None, help="a smaller model of the same vocabulary; by default story-draft for story")
    parser.add_argument("--methods", default="", help="the only methods that draft, separated by commas; by default all")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of peers, replay, costs")
    parser.add_argument("--samples", type=int, default=Sizes.samples)
    parser.add_argument("--new", type=int, default=Sizes.new, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=Sizes.repeats)
    parser.add_argument("--output", default=None, help="a file for the JSON, beside standard output")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, not how fast")
    given = parser.parse_args(arguments)
    parts = given.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts are some of {', '.join(PARTS)}")
    model = given.model or ("needle" if given.quick else "story")
    draft = given.draft or {"story": "story-draft", "needle": "needle"}.get(model)
    sizes = QUICK if given.quick else Sizes(given.samples, given.new, repeats=given.repeats)
    names = given.methods.split(",") if given.methods else []
    result = run(model, draft, parts, names, sizes, given.quick, lambda line: print(line, file=sys.stderr, flush=True))
    result["command"] = shell_command(sys.argv[1:]).replace("laconic", "python benchmarks/decoding.py", 1)
    text = dumps(result, indent=2)
    print(text)
    if given.output:
        with open(given.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    return result


if __name__ == "__main__":
    main()
