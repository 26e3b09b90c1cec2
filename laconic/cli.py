"""The command line. Results go to stdout, progress and errors to stderr; bad input exits 2, Ctrl-C 130."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.errors import LaconicError

app = typer.Typer(
    name="laconic",
    help="Which tokens does your model need? Compare KV-cache and sparse-attention methods on your own workload, "
    "choose, apply.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON only on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda; by default a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Weights as float32, bfloat16, ...; by default as stored.")]
Model = Annotated[str, typer.Option("--model", "-m", help="A built-in model, a local path, or a hub id.")]
Seeing = Annotated[str, typer.Option("--model", "-m", help="A model that sees: the built-in one, a local path, or a hub id.")]
Lengths = Annotated[str | None, typer.Option("--lengths", help="Prompt lengths (built-in tasks): 1024,4096")]
Question = Annotated[
    str, typer.Option("--question", help="seen: prefill the whole prompt; after: choose before seeing the question.")
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a different run in --output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")]
PictureTask = Annotated[str, typer.Option("--task", "-t", help="shapes_vqa, pope, or FILE.jsonl with pictures.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors as one sentence on stderr: exit code 2 for what the user can mend, 130 for Ctrl-C, 1 for a bug of ours."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        debug = options.get("debug", False)
        try:
            if command.__name__ not in ("methods", "bench") and not debug:
                _silence_libraries()
            command(**options)
            sys.stdout.flush()
        except LaconicError as error:
            _fail(f"Error: {error}", 2, error, debug)
        except BrokenPipeError as error:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _fail("", 0, error, False)
        except KeyboardInterrupt as error:
            _fail(str(error) or "Interrupted.", 130, error, debug)
        except typer.Exit:
            raise
        except Exception as error:  # the last line of defence: no traceback unless it is asked for
            _fail(f"Unexpected {type(error).__name__}: {error} (run with --debug to see where)", 1, error, debug)

    return run


def _fail(message: str, code: int, error: BaseException, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    if message:
        print(" ".join(message.split()), file=sys.stderr)
    raise typer.Exit(code) from None


def _silence_libraries() -> None:
    """Keeps warnings meant for programmers, and bars that are not ours, out of the terminal; --debug leaves them in."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _split(text: str | None) -> list[str] | None:
    """A comma-separated list; commas inside parentheses belong to a recipe."""
    if text is None:
        return None
    from laconic.recipe import split

    named = [part.strip() for part in split(text, ",") if part.strip()]
    if not named:
        raise LaconicError(f"'{text}' is an empty list: give one or more names, separated by commas.")
    return named


def _whole_numbers(text: str | None, option: str) -> list[int] | None:
    try:
        numbers = [int(part) for part in _split(text) or []]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise LaconicError(f"{option} '{text}' is not understood: give whole numbers above 0, such as 1024,2048.")
    return numbers or None


def _numbers(text: str | None, option: str) -> list[float] | None:
    try:
        return [float(part) for part in _split(text) or []] or None
    except ValueError:
        raise LaconicError(f"{option} '{text}' is not understood: give numbers such as 0,0.7,1.") from None


def _print_json(value: Any) -> None:
    from laconic.evaluation.results import dumps

    print(dumps(value, indent=2))


@app.command()
@guarded
def compare(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A built-in model, a local path, or a hub id.",
            show_default="needle, or story with --suite decoding",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "-t",
            help="needle, multi_needle, threads, kv_recall, long_generation, perplexity:FILE, or FILE.jsonl; with pictures "
            "shapes_vqa, pope, or FILE.jsonl. By default needle, or shapes_vqa where the model sees. With --suite decoding: "
            "prose, code, repetitive, FILE.jsonl, separated by commas; a file alone comes on top of the three.",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Names or recipes, separated by commas (see laconic methods).")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="What may stay: tokens (256) or shares (10%), separated by commas.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the report.")] = Path("laconic-report"),
    samples: Annotated[int | None, typer.Option("--samples", help="Number of examples in all.")] = None,
    lengths: Lengths = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the task's examples.")] = 0,
    question: Question = "seen",
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="cards: measure what each of --methods (by default all) is expected to show; decoding: what drafting gains.",
        ),
    ] = None,
    temperatures: Annotated[str | None, typer.Option("--temperatures", help="With --suite decoding: by default 0,1.")] = None,
    batches: Annotated[
        str | None, typer.Option("--batches", help="With --suite decoding: prompts at a time, by default 1,8.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods x budgets on a workload: quality, bytes, time and memory, each beside dense.

    Without options: the built-in model finds facts in long real text, in about two minutes. With --model shapes: the built-in
    model that sees answers questions about rendered scenes, in about as long. Other models that see answer these, too.
    Every finished cell is on disk at once: after Ctrl-C or a crash the same command goes on.

    \b
    Your own prompts, one JSON object a line, with or without an answer:
      {"prompt": "...", "answer": "...", "max_new_tokens": 32}
      {"prompt": "...", "image": "photo.jpg", "answer": "..."}

    \b
    Examples:
      laconic compare
      laconic compare --methods tokenselect,h2o --budgets 64,5%,10%
      laconic compare --model shapes
      laconic compare --model shapes --task pope --methods divprune,fastv --budgets 11.1%
      laconic compare --model PATH_OR_HUB_ID --task mine.jsonl
      laconic compare --question after --output after-report
      laconic compare --task long_generation --max-new-tokens 2000 --budgets 128,256
      laconic compare --methods "tokenselect(refresh=0.8)" --json
      laconic compare --suite cards --methods quest,snapkv
      laconic compare --suite decoding
      laconic compare --suite decoding --methods token_recycling --budgets 8,24,80 --batches 1
    """
    if suite not in (None, "decoding"):
        _suite(suite, _split(methods), model, output, samples, overwrite, as_json, quiet)
        return
    common: dict[str, Any] = {
        "methods": _split(methods), "budgets": _split(budgets), "samples": samples, "seed": seed,
        "max_new_tokens": max_new_tokens, "device": device, "dtype": dtype, "output": output, "overwrite": overwrite,
        "progress": not quiet,
    }  # fmt: skip
    sizes = _whole_numbers(lengths, "--lengths")
    if suite == "decoding":
        _decoding(model, task, sizes, question, temperatures, batches, common, as_json)
        return
    if temperatures is not None or batches is not None:
        raise LaconicError("--temperatures and --batches go with --suite decoding: leave them out, or add it.")
    from laconic.evaluation.compare import compare as run
    from laconic.evaluation.provenance import shell_command

    report = run(
        model or "needle", task=task, lengths=sizes, question=question, command=shell_command(sys.argv[1:]), **common
    )
    _show(report, as_json, quiet, lambda console: report.table(ratios=console.width >= 120))


def _decoding(
    model: str | None, task: str | None, lengths: list[int] | None, question: str, temperatures: str | None,
    batches: str | None, common: dict[str, Any], as_json: bool,
) -> None:  # fmt: skip
    """Measures what drafting gains."""
    from laconic.evaluation.decoding_suite import BATCHES, TEMPERATURES, decoding_suite
    from laconic.evaluation.provenance import shell_command

    if question != "seen" or len(lengths or ()) > 1:
        raise LaconicError("--suite decoding knows no --question, and takes one number for --lengths: leave the rest out.")
    report = decoding_suite(
        model or "story",
        workloads=_split(task),
        length=lengths[0] if lengths else None,
        temperatures=_numbers(temperatures, "--temperatures") or TEMPERATURES,
        batches=_whole_numbers(batches, "--batches") or BATCHES,
        command=shell_command(sys.argv[1:]),
        **common,
    )
    _show(report, as_json, not common["progress"], lambda console: report.table())


def _show(report: Any, as_json: bool, quiet: bool, table: Callable[[Any], Any]) -> None:
    """Prints what a comparison found."""
    for note in report.notes:
        print(f"Note: {note}", file=sys.stderr)
    if as_json:
        _print_json({"report": str(report.html), "run": report.run, "rows": report.rows, "notes": report.notes})
        return
    if not quiet:
        console = _console()
        console.print(table(console))
    print(f"Report: {report.html}")


def _suite(
    suite: str, methods: list[str] | None, model: str | None, output: Path, samples: int | None, overwrite: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Measures the claims of methods and prints which hold."""
    from laconic.evaluation.suite import outcome_table, run_suite

    rows = run_suite(
        suite, methods, model=model, output=output, samples=samples, overwrite=overwrite, progress=not quiet
    )
    if as_json:
        _print_json(rows)
        return
    if not quiet:
        _console().print(outcome_table(rows))
    print(f"{sum(row['holds'] for row in rows)} of {len(rows)} claims hold; all are in {output / 'outcomes.jsonl'}")


def _console():
    """A console on stdout; into a pipe or a file it is wide enough for the tables."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


@app.command()
@guarded
def tune(
    model: Model = "needle",
    task: Annotated[str | None, typer.Option("--task", "-t", help="As in laconic compare: a name, or FILE.jsonl")] = None,
    keep: Annotated[str, typer.Option("--keep", help="Share of the dense quality to keep: 99% or 0.99.")] = "99%",
    cost: Annotated[
        str, typer.Option("--cost", help="read: bytes read per step; kept: bytes of the cache; time: of a decode step.")
    ] = "read",
    methods: Annotated[
        str | None, typer.Option("--methods", help="Names or recipes to tune, separated by commas; by default all methods.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="The only budgets to try; by default shares from 0.5% to 80%.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Recipes to try; by default 40 and one for every method.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")] = Path("laconic-tune"),
    samples: Annotated[
        int | None, typer.Option("--samples", help="Number of prompts: half to search, half to check. 60 for built-in tasks.")
    ] = None,
    lengths: Lengths = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the prompts, of their split and of the search.")] = 0,
    question: Question = "seen",
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the cheapest recipe that keeps the quality: it searches methods, budgets and parameters on half of the prompts.

    The other half checks the claim; without answers, quality is the fidelity to dense. The recipe is a file for apply,
    generate and Recipe.load. Every tried recipe is on disk at once: after Ctrl-C or a crash the same command goes on.

    \b
    Examples:
      laconic tune
      laconic tune --keep 95% --cost kept --methods snapkv,h2o
      laconic tune --model PATH_OR_HUB_ID --task mine.jsonl
      laconic tune --methods "snapkv + tokenselect" --trials 80
      laconic generate --method laconic-tune/recipe.json < long.txt
    """
    from laconic.evaluation.provenance import shell_command
    from laconic.evaluation.tune import tune as run
    from laconic.evaluation.tune_tables import cost_line, tried_table

    tuned = run(
        model,
        keep=keep,
        cost=cost,
        methods=_split(methods),
        budgets=_split(budgets),
        trials=trials,
        task=task,
        samples=samples,
        lengths=_whole_numbers(lengths, "--lengths"),
        seed=seed,
        question=question,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        output=output,
        overwrite=overwrite,
        progress=not quiet,
        command=shell_command(sys.argv[1:]),
    )
    for note in tuned.run["notes"]:
        print(f"Note: {note}", file=sys.stderr)
    if as_json:
        _print_json(tuned.as_dict())
        return
    if not quiet:
        console = _console()
        console.print(tried_table(tuned))
    print(f"Recipe: {tuned}\n{cost_line(tuned)}\n{tuned.verdict.sentence}\nFile: {tuned.path}")


@app.command()
@guarded
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it, standard input is read.")] = None,
    model: Model = "needle",
    method: Annotated[str, typer.Option("--method", help="A recipe, such as tokenselect:256.")] = "dense",
    draft: Annotated[
        str | None, typer.Option("--draft", help="What drafts tokens ahead, such as token_recycling or prompt_lookup:8.")
    ] = None,
    show_tree: Annotated[
        bool, typer.Option("--show-tree", help="Show what is drafted and accepted, and how much faster it was than without.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample from so many of the likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest that make up this share.")] = 1.0,
    penalty: Annotated[float, typer.Option("--penalty", help="Above 1: makes tokens that are there already unlikelier.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Ends the text before this string; may be given several times.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="The answer has to match this pattern as a whole.")] = None,
    schema: Annotated[Path | None, typer.Option("--schema", help="The answer has to be JSON after this schema, a file.")] = None,
    grammar: Annotated[Path | None, typer.Option("--grammar", help="The answer has to follow this Lark grammar, a file.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling, with --temperature.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with a method inside the model. Text streams to stdout, figures go to stderr.

    \b
    Examples:
      laconic generate "The capital of France is" --model PATH_OR_HUB_ID
      laconic generate --method tokenselect:256 < long.txt
      laconic generate --method h2o:10% --json < long.txt
      laconic generate "Once upon a time" --model story --draft token_recycling --show-tree
      laconic generate "Her number is" --model story --regex " [0-9]{3}-[0-9]{4}"
      laconic generate "reverse: sea lamp tree =" --model mask --method local_leap
    """
    from laconic.evaluation.table import seconds, size
    from laconic.evaluation.workload import open_model
    from laconic.generation import generate as run

    text = prompt if prompt is not None else _standard_input()
    if show_tree and draft is None:
        raise LaconicError("There is no tree to show: say what drafts with --draft, such as token_recycling.")
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "penalty": penalty,
        "stop": stop or [], "seed": seed, "chat": chat, "constraint": _constraint(regex, schema, grammar),
    }  # fmt: skip
    if show_tree:
        from laconic.decoding.show import TreeView

        network, tokenizer, _ = open_model(model, device, dtype)
        plain = run((network, tokenizer), text, method, **options)
        with TreeView(_console(), tokenizer).watching() as view:
            result = run((network, tokenizer), text, method, drafter=draft, watch=view, **options)
        result["model"], result["speed"] = model, _speed(plain, result)
    else:
        stream = None if as_json else sys.stdout
        result = run(model, text, method, drafter=draft, device=device, dtype=dtype, stream=stream, **options)
    if as_json:
        _print_json(result)
        return
    stats, prefill = result["stats"], result["prefill_s"]
    line = f"{result['prompt_tokens']} + {result['tokens']} tokens, {result['method']}: "
    line += "" if prefill is None else f"prefill {seconds(prefill)}, "
    line += f"decode {seconds(result['decode_s'])}/token"
    line += "" if stats is None else f", {size(stats['bytes_kept'])} kept, {size(stats['bytes_read'])} read/step"
    print(line, file=sys.stderr)
    if stats is None or draft is not None:
        print(_forwards_line(result), file=sys.stderr)
    if result["satisfied"] is False:
        raise LaconicError("The text ended before it satisfied the constraint: give more --max-new-tokens.")


def _constraint(regex: str | None, schema: Path | None, grammar: Path | None) -> Callable[[Any], Any] | None:
    """What makes the constraint of a tokenizer."""
    if sum(given is not None for given in (regex, schema, grammar)) > 1:
        raise LaconicError("An answer follows one of --regex, --schema and --grammar: give one of them.")
    if regex is schema is grammar is None:
        return None
    from laconic.decoding import constraints
    from laconic.evaluation.haystack import read_text

    if regex is not None:
        return functools.partial(constraints.regex, regex)
    make = constraints.json_schema if schema is not None else constraints.lark
    return functools.partial(make, read_text(schema if schema is not None else grammar))


def _speed(plain: dict[str, Any], drafted: dict[str, Any]) -> float | None:
    """How many times faster tokens came after the first one."""
    return plain["decode_s"] / drafted["decode_s"] if plain["decode_s"] and drafted["decode_s"] else None


def _forwards_line(result: dict[str, Any]) -> str:
    each = result["tokens_per_forward"]
    each = "no" if each is None else f"{each:.2f}"
    line = f"{result['forwards']} forwards, {each} tokens per forward, {result['guarantee']}"
    return line if result.get("speed") is None else f"{line}, {result['speed']:.2f}x the speed of plain decoding"


@app.command()
@guarded
def see(
    image: Annotated[
        str, typer.Argument(help="A picture: PNG, JPEG, ...; scene:N, the N-th rendered one; or photo:NAME, a real photograph.")
    ] = "scene:0",
    question: Annotated[str | None, typer.Argument(help="What to ask about it; of a scene, by default its own question.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="A recipe, such as divprune:10%; may be given several times.")
    ] = None,
    also: Annotated[list[str] | None, typer.Option("--also", help="Another picture of the same prompt.")] = None,
    model: Seeing = "shapes",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the pictures go: .png, or .html with scores.")] = Path(
        "laconic-see.png"
    ),
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 32,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask about a picture, dense and with methods that drop picture tokens, and see which patches stay.

    Kept patches are shown as they are, dropped ones faded, merged ones tinted blue; what only some layers hold lies between.

    \b
    Examples:
      laconic see
      laconic see scene:4 "What colour is the star?" --method divprune:5.6% --method fastv:11.1%
      laconic see photo.jpg "What is on the table?" --model PATH_OR_HUB_ID --method visionzip:10% --output table.html
      laconic see photo:coffee "What is on the table?" --model PATH_OR_HUB_ID
    """
    from laconic.evaluation.workload import open_model
    from laconic.vision.overlay import save_views
    from laconic.vision.see import SHOWN_METHODS, asked_about, picture_named
    from laconic.vision.see import see as run

    picture, question = asked_about(image, question)
    shown = [picture, *(picture_named(name)[0] for name in also or [])]
    network, reader, _ = open_model(model, device, dtype)
    views, pictures = run(network, reader, shown, question, method or SHOWN_METHODS, max_new_tokens=max_new_tokens)
    save_views(output, views, pictures, question)
    if as_json:
        _print_json({"question": question, "model": model, "output": str(output), "views": [view.row() for view in views]})
        return
    from laconic.evaluation.table import view_table

    _console().print(view_table(views))
    print(f"Pictures: {output}")


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise LaconicError('There is no prompt: write laconic generate "...", or pipe a text in.')
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise LaconicError(f"Standard input is not UTF-8 text (byte {error.start}): convert it first.") from error
    if not text.strip():
        raise LaconicError("The prompt on standard input is empty: pipe a text in.")
    return text


@app.command()
@guarded
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The catalogue of methods, or everything about one of them.

    \b
    Examples:
      laconic methods
      laconic methods tokenselect
      laconic methods --json
    """
    import laconic
    from laconic.catalogue import catalogue_table, method_page
    from laconic.registry import find

    if name is not None:
        row = find(name).describe()
        _print_json(row) if as_json else _console().print(method_page(row))
        return
    rows = laconic.methods()
    if as_json:
        _print_json(rows)
        return
    _console().print(catalogue_table(rows))
    print("laconic methods NAME tells all about one: parameters, source, details.")


@app.command()
@guarded
def bench(
    name: Annotated[str | None, typer.Argument(help="One benchmark; without it, all run.")] = None,
    names: Annotated[bool, typer.Option("--list", help="Only list the benchmarks.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that it works, not how fast.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The speed suite: ours against the stock path, in one run, on this machine.

    \b
    Examples:
      laconic bench --list
      laconic bench dense_decode --json
      laconic bench
    """
    from laconic.bench.run import benchmark_names, benchmarks, run_benchmark

    if names:
        lines = [f"{row['name']:<20} {row['summary']}" for row in benchmarks()]
        _print_json(benchmarks()) if as_json else print("\n".join(lines))
        return
    if name is not None:
        row = run_benchmark(name, quick=quick)
        _print_json(row) if as_json else print(_benchmark_line(row))
        return
    rows = []
    for each in benchmark_names():
        try:
            rows.append(run_benchmark(each, quick=quick))
        except LaconicError as error:
            print(f"{each} did not run: {error}", file=sys.stderr)
            rows.append({"name": each, "met": False, "error": str(error)})
        if not as_json and "error" not in rows[-1]:
            print(_benchmark_line(rows[-1]), flush=True)
    if as_json:
        _print_json(rows)
        return
    short = [row["name"] for row in rows if not row["met"]]
    print(f"Short of the target: {', '.join(short)}." if short else "All targets are reached.")


def _benchmark_line(row: dict[str, Any]) -> str:
    mark = "reached" if row["met"] else "SHORT"
    return (
        f"{row['name']:<20} {row['ratio']:>8.2f}x  (target {row['target']:g}x, {mark})  "
        f"ours {row['ours']:.4g} {row['unit']}, reference {row['reference']:.4g} {row['unit']}"
    )


@app.command()
@guarded
def profile(
    method: Annotated[str, typer.Argument(help="A method that needs calibration (see laconic methods).")],
    model: Model = "needle",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("profile.json"),
    task: Annotated[str | None, typer.Option("--task", "-t", help="Prompts, as in compare: a name, or FILE.jsonl")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Stretches of a UTF-8 text instead.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Length of each sample.")] = 1024,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to calibrate on.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the built-in prompts.")] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps of training, for methods that can be trained longer.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what a method has to know about a model, once, and keep it in a file; for some methods, train it.

    Methods that reweight (zerotuning, act) look for the heads with which the prompts are answered better. The score is the share
    of right answers, and then the mean log-probability of these; without answers, minus the entropy of the next token. It is
    the highest of many, so check it on other prompts.

    dhsa, duo_attention, explain_prune and flash_sd are trained, explain_prune on those prompts that the model answers right,
    flash_sd on what the model writes after prompts with pictures. parallel_prompt_decoding and medusa, which draft too, are
    trained on what the model says itself after many places of the texts: give a long one.

    \b
    Examples:
      laconic profile fasa --model PATH_OR_HUB_ID --output fasa.json
      laconic profile dhsa --model PATH_OR_HUB_ID --samples 16 --output dhsa.json
      laconic profile zerotuning --model PATH_OR_HUB_ID --task mine.jsonl --samples 40 --output zt.json
      laconic profile attention_debias --model PATH_OR_HUB_ID --samples 40 --output debias.json
      laconic profile explain_prune --model PATH_OR_HUB_ID --samples 2000 --output explain.json
      laconic profile medusa --model PATH_OR_HUB_ID --text mine.txt --samples 500 --steps 2000 --output medusa.json
      laconic compare --model PATH_OR_HUB_ID --methods "fasa(profile=fasa.json)" --budgets 10%
    """
    from dataclasses import asdict

    from laconic.evaluation.calibration import answered_pictures, calibration_pictures, calibration_texts
    from laconic.evaluation.workload import default_task, open_model
    from laconic.profiles import make_profile
    from laconic.registry import find

    calibrates_on = getattr(find(method), "calibrates_on", "texts")
    network, tokenizer, _ = open_model(model, device, dtype)
    task = task or default_task(tokenizer)
    if calibrates_on == "pictures":
        texts, answers = calibration_pictures(tokenizer, task, samples, seed), None
    elif calibrates_on == "answered pictures":
        texts, answers = answered_pictures(network, tokenizer, task, samples, seed)
    else:
        texts, answers = calibration_texts(tokenizer, text, task, tokens, samples, seed)
    made = make_profile(method, network, texts, seed, answers, steps)
    made.save(output)
    if as_json:
        _print_json(asdict(made))
        return
    if "before" in made.tables:
        scores = (", ".join(f"{number:.4g}" for number in made.tables[when]) for when in ("before", "after"))
        print("Score on these prompts: {} without the method, {} with this profile".format(*scores))
    print(f"Profile: {output}")


explain = typer.Typer(help="Why a model attends as it does.", no_args_is_help=True)
app.add_typer(explain, name="explain")


@explain.command()
@guarded
def sinks(
    model: Model = "needle",
    text: Annotated[Path | None, typer.Option("--text", help="A UTF-8 text; by default the built-in one.")] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A second text: which heads sleep on one and not on the other.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Length of each sample.")] = 1024,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples of the text.")] = 4,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Which heads sleep on the first token: weight on the sink, drained values, residual peaks.

    A head that has nothing to do must still put its attention somewhere: it puts it on one token, the sink, whose value it
    keeps small. It is dormant when later tokens give the sink at least half of their attention on average, and active below a
    quarter. In parentheses stands the length of the sink's value over the median, and last the same of its hidden state: far
    below and far above 1 they tell a real sink. Its position tells how many first tokens a method should protect.

    \b
    Examples:
      laconic explain sinks
      laconic explain sinks --model PATH_OR_HUB_ID --text code.txt --json
      laconic explain sinks --model PATH_OR_HUB_ID --text code.txt --against novel.txt
    """
    from laconic.evaluation.calibration import text_samples
    from laconic.evaluation.workload import open_model
    from laconic.explain.sinks import active_dormant_map, map_table, sink_report, sink_table, summary

    network, tokenizer, _ = open_model(model, device, dtype)
    texts = text_samples(tokenizer, text, tokens, samples)
    if against is not None:
        first = text.name if text is not None else "built-in"
        second = against.name if against.name != first else f"{against.name} (2)"
        rows = active_dormant_map(network, {first: texts, second: text_samples(tokenizer, against, tokens, samples)})
        _print_json(rows) if as_json else _console().print(map_table(rows))
        return
    report = sink_report(network, texts)
    if as_json:
        residual = report.residual_ratio.tolist()
        _print_json({"sink": report.sink, "heads": report.rows(), "residual_ratio": residual, "summary": summary(report)})
        return
    _console().print(sink_table(report))
    print(summary(report))


@explain.command()
@guarded
def horizon(
    model: Seeing = "shapes",
    task: PictureTask = "shapes_vqa",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Questions to measure on.")] = 24,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Picture tokens sampled in each.")] = 16,
    form: Annotated[str, typer.Option("--form", help="keep-one: each token alone; leave-one-out: all but each.")] = "keep-one",
    tolerance: Annotated[float, typer.Option("--tolerance", help="Share of the accuracy that may be lost.")] = 0.01,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the questions and of the sampled tokens.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a single picture token still tells the model at each layer, and from which layer on the picture is not needed.

    Information is a difference of probabilities of the right answer: with one picture token alone from a layer on, less that
    without any. The accuracy beside it is that without all picture tokens from there on. The horizon is the first layer from
    which on this costs next to nothing; it differs between kinds of questions, so measure on yours. It knows the answers: it
    explains, and cannot choose tokens.

    \b
    Examples:
      laconic explain horizon
      laconic explain horizon --model PATH_OR_HUB_ID --task mine.jsonl --samples 100 --form leave-one-out --json
    """
    from laconic.evaluation.workload import open_model, open_work
    from laconic.explain.horizon import horizon_table, information_horizon, summary

    network, reader, _ = open_model(model, device, dtype)
    work = open_work(task, reader, samples=samples, seed=seed)
    report = information_horizon(network, reader, work, form=form, tokens=tokens, tolerance=tolerance, seed=seed)
    if as_json:
        found = {"horizon": report.horizon, "recipe": report.recipe, "kinds": report.kind_horizons()}
        _print_json({**found, "form": form, "layers": report.rows(), "summary": summary(report)})
        return
    _console().print(horizon_table(report))
    print(summary(report))


@explain.command()
@guarded
def dominance(
    model: Seeing = "shapes",
    task: PictureTask = "shapes_vqa",
    method: Annotated[
        list[str] | None, typer.Option("--method", help="A recipe beside dense, divprune:10%; may be given several times.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Questions to measure on.")] = 24,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the questions.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Whether the model reads its pictures or only the words: attention per word token over attention per picture token.

    MDI is that quotient, from the rows that the answer is read from; AEI is a kind's share of the attention over its share of
    the tokens. 1 is even. Both change with the number of tokens by themselves, so a lower MDI with fewer picture tokens does not
    say that these are read better: look at the accuracy, and at what is left of it when the model sees nothing (blind).

    \b
    Examples:
      laconic explain dominance
      laconic explain dominance --method divprune:50% --method divprune:25% --method divprune:10%
    """
    from laconic.evaluation.workload import open_model, open_work
    from laconic.explain.dominance import dominance_table, summary, text_dominance

    network, reader, _ = open_model(model, device, dtype)
    work = open_work(task, reader, samples=samples, seed=seed)
    report = text_dominance(network, reader, work, ["dense", *(method or [])])
    if as_json:
        _print_json({"rows": report.rows(), "summary": summary(report)})
        return
    _console().print(dominance_table(report))
    print(summary(report))


@explain.command()
@guarded
def relevance(
    image: Annotated[str, typer.Argument(help="As in laconic see: a picture, scene:N or photo:NAME.")] = "scene:0",
    question: Annotated[str | None, typer.Argument(help="What to ask about it; of a scene, by default its own question.")] = None,
    model: Seeing = "shapes",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the picture goes.")] = Path("laconic-relevance.png"),
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Which patches of a picture the model's answer rests on: attention, weighted by its gradients, through all layers.

    The more relevant a patch is, the clearer it is shown; the less relevant half is faded. It takes the memory of the attention
    maps of all layers twice, and computes in float32.

    \b
    Examples:
      laconic explain relevance
      laconic explain relevance photo.jpg "What is on the table?" --model PATH_OR_HUB_ID --output table.png
    """
    from laconic.evaluation.workload import open_model
    from laconic.explain.relevance import explain_answer
    from laconic.vision.overlay import save_strip
    from laconic.vision.see import asked_about

    picture, question = asked_about(image, question)
    network, reader, _ = open_model(model, device, dtype)
    explained = explain_answer(network, reader, picture, question, max_new_tokens)
    save_strip(output, explained.shown, explained.picture)
    if as_json:
        _print_json({"question": question, "model": model, "output": str(output), **explained.row()})
        return
    print(f"Answer: {explained.answer}")
    print(f"Half of its relevance lies in {explained.half} of {explained.tokens} picture tokens.")
    print(f"Picture: {output}")


def main() -> None:
    """Entry point of the ``laconic`` command."""
    app()
