"""Controlled sampling in numbers: ``python benchmarks/constrained.py [--model PATH] [--parts zipf,toy,model,adadec,reflex]``.

Prints one JSON object. ``zipf``: checks per draw over a Zipf law of 20,000 tokens. ``toy``: error of the posterior of two steps,
which is known. ``model``: checks and time per token of a model under a pattern and a JSON schema, of AWRS, of masks tested token
by token and of the grammar library's own masks. ``adadec``: the rest of held-out lines of Python, greedy, AdaDec and beams of 3.
``reflex``: a Markov reasoner with words of reflection. The parts ``model`` and ``adadec`` need a model that writes text.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import numpy as np
import torch

from laconic import get, load
from laconic.decoding.awrs import Redraw, first, geometric, recursive, visits
from laconic.decoding.constraints import json_schema, predicate, regex, token_bytes
from laconic.decoding.cyclic_reflex import wave
from laconic.decoding.engine import decode
from laconic.decoding.particles import sample
from laconic.models.text_data import python_sources

SCHEMA = {
    "type": "object", "required": ["name", "age", "kind"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["author", "character", "place"]},
    },
}  # fmt: skip
PATTERN = r" (the|a|an) [a-z]{2,9}( [a-z]{2,9}){0,3}\."
PROMPT = "The old house by the river belonged to"


def zipf(size: int = 20_000, sets: int = 100, draws: int = 10) -> list[dict]:
    """Mean checks per draw, over random sets of valid tokens; a mask of tests takes ``size``."""
    logs = torch.arange(1, size + 1, dtype=torch.float64).reciprocal().log().log_softmax(0)
    rows = []
    for share in (0.5, 0.1, 0.01):
        counts = {"first": [], "recursive": [], "geometric": []}
        for seed in range(sets):
            generator = torch.Generator().manual_seed(seed)
            ok = (torch.rand(size, generator=generator) < share).tolist().__getitem__
            for name, found in counts.items():
                for order in visits(logs.expand(draws, -1), generator):
                    if name == "geometric":
                        found.append(geometric(Redraw(logs, order, generator), ok).checks)
                    else:
                        found.append((first if name == "first" else recursive)(order, ok).checks)
        rows.append({"valid": share, "masking": size, **{name: float(np.mean(values)) for name, values in counts.items()}})
    return rows


def toy(runs: int = 600) -> list[dict]:
    """Total variation between the exact posterior of two steps and what N particles say: its mean, and that of the mean run."""
    start = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    rest = torch.tensor([[0.01, 0.98, 0.01], [0.5, 0.3, 0.2], [0.2, 0.4, 0.4]], dtype=torch.float64).log()
    valid = [(0, 0), (1, 0), (1, 1)]
    exact, generator, rows = np.array([0.006, 0.150, 0.090]) / 0.246, torch.Generator().manual_seed(0), []
    for name, draw in (("weights", recursive), ("no weights", first)):
        for count in (1, 5, 20):
            found = np.zeros((runs, 3))
            for run in range(runs):
                for order in visits(start.expand(count, -1), generator):
                    a = draw(order, lambda token: token < 2)
                    b = draw(visits(rest[a.token][None], generator)[0], lambda token: (a.token, token) in valid)  # noqa: B023
                    if b.token is not None:
                        found[run, valid.index((a.token, b.token))] += math.exp(a.weight + b.weight)
            found = found[found.sum(1) > 0]
            found /= found.sum(1, keepdims=True)
            error, bias = np.abs(found - exact).sum(1).mean() / 2, np.abs(found.mean(0) - exact).sum() / 2
            rows.append({"law": name, "particles": count, "error": float(error), "bias": float(bias)})
    return rows


def sentence(tokenizer):
    """The same language as ``PATTERN``, as a Python predicate: what a user would write who has no grammar."""
    import regex as partial

    compiled = partial.compile(PATTERN)
    return predicate(lambda text: compiled.fullmatch(text, partial=True) is not None,
                     lambda text: compiled.fullmatch(text) is not None, tokenizer)  # fmt: skip


def constrained(model, tokenizer, particles: int = 10, seeds: int = 3) -> list[dict]:
    """Checks and time per token of a model."""
    inputs, rows = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False), []
    made = {
        "pattern": regex(PATTERN, tokenizer), "pattern, in Python": sentence(tokenizer),
        "JSON schema": json_schema(SCHEMA, tokenizer),
    }  # fmt: skip
    ways = ("awrs", "awrs(proper_weights=false)", "masking", "masking(proper_weights=true)", "masking(whole=false)")
    sample(model, inputs, made["pattern"], "masking", max_new_tokens=4)  # compiles
    for name, constraint in made.items():
        for way in ways:
            method = get(way.split("(")[0], particles=particles, **dict([p.split("=") for p in way[:-1].split("(")[1:]]))
            outs = []
            for seed in range(seeds):
                constraint.start._known.clear(), constraint.start._next.clear()
                outs.append(sample(model, inputs, constraint, method, max_new_tokens=40, seed=seed))
            tokens = sum(o.tokens for o in outs)
            rows.append({
                "constraint": name, "method": way, "checks_per_token": sum(o.checks for o in outs) / tokens,
                "check_ms_per_token": 1e3 * sum(o.check_s for o in outs) / tokens,
                "model_ms_per_token": 1e3 * sum(o.model_s for o in outs) / tokens,
                "finished": float(np.mean([(o.log_weights > -math.inf).double().mean() for o in outs])),
                "valid": all(constraint.accepts(row) for o in outs for row in o.posterior),
                "effective": float(np.mean([1 / float((o.weights**2).sum()) if o.satisfied else 0.0 for o in outs])),
                "evidence": [round(o.evidence, 2) for o in outs], "best": tokenizer.decode(outs[0].best or []),
            })  # fmt: skip
    return rows


def lines(tokenizer, samples: int, seed: int, context: int = 160) -> list[tuple[list[int], list[int]]]:
    """Token ids of held-out Python up to the middle of a line, and of the rest of it, its line break included."""
    breaks = [b"\n" in (piece or b"") for piece in token_bytes(tokenizer)]
    rng, files, found = np.random.default_rng(seed), python_sources(held_out=True), []
    while len(found) < samples:
        text = files[rng.integers(len(files))].read_text(errors="ignore")[:40_000]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [i for i, token in enumerate(ids) if breaks[token] and i > context]
        if len(ends) < 3:
            continue
        at = int(rng.integers(len(ends) - 1))
        begin, end = ends[at] + 1, ends[at + 1] + 1
        if 6 <= end - begin <= 24:
            middle = begin + (end - begin) // 2
            found.append(([tokenizer.bos_token_id, *ids[middle - context : middle]], ids[middle:end]))
    return found


def adadec(model, tokenizer, samples: int = 100) -> list[dict]:
    """Share of lines that end as they should, and what that took."""
    ends = [token for token, piece in enumerate(token_bytes(tokenizer)) if b"\n" in (piece or b"")]
    known = lines(tokenizer, 60, seed=1)
    table = get("adadec", threshold=0).calibrate(model, [torch.tensor(a) for a, _ in known], [torch.tensor(b) for _, b in known])
    rows, tasks = [{"threshold": table}], lines(tokenizer, samples, seed=2)

    def stem(ids):
        return tokenizer.decode(ids).split("\n")[0]

    ways = {"greedy": "dense", "adadec": f"adadec(threshold={table['threshold']})", "adadec, always": "adadec(threshold=0)",
            "adadec, sums": f"adadec(threshold={table['threshold']},sums=true)", "beams of 3": None}  # fmt: skip
    for name, recipe in ways.items():
        right, forwards, nodes, gated, tokens, begun = 0, 0, 0, 0, 0, time.perf_counter()
        for prompt, rest in tasks:
            inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
            if recipe is None:
                with torch.inference_mode():
                    out = model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=24, eos_token_id=ends,
                                         pad_token_id=tokenizer.pad_token_id)[0, len(prompt):].tolist()  # fmt: skip
                made, forwards, nodes = out, forwards + len(out), nodes + 3 * (len(out) - 1)
            else:
                done = decode(model, inputs, recipe, max_new_tokens=24, ends=ends)
                made, forwards, nodes = done.rows[0], forwards + done.forwards, nodes + done.nodes
                gated += done.figures.get("gated", 0)
            tokens += len(made)
            right += stem(made) == stem(rest)
        rows.append({
            "way": name, "right": right / samples, "gated": gated / tokens, "forwards_per_token": forwards / tokens,
            "nodes_per_token": nodes / tokens, "ms_per_token": 1e3 * (time.perf_counter() - begun) / tokens,
        })  # fmt: skip
    return rows


def reflex(runs: int = 20_000, most: int = 600, steps: int = 60, seed: int = 0) -> list[dict]:
    """A reasoner in three states. Thinking makes progress and now and then an error; reflecting repairs one error, or without one
    throws the thread away and costs progress; after ``steps`` of progress it answers, rightly if no error is left."""
    rows = []
    periods = {"none": None, "+3": 3.0, "+2": 2.0, "-2": -2.0, "-3": -3.0, "cyclic, period 60": 60, "cyclic, period 120": 120,
               "cyclic, period 240": 240}  # fmt: skip
    for bias in (-4.0, -2.0, 0.0):
        for name, kind in periods.items():
            rng = np.random.default_rng(seed)
            progress, errors = np.zeros(runs), np.zeros(runs)
            going, right, reflected, spent = np.ones(runs, bool), np.zeros(runs, bool), 0, 0
            for t in range(most):
                delta = 0.0 if kind is None else kind if isinstance(kind, float) else float(wave(torch.tensor(t), 3.0, kind))
                reflects = going & (rng.random(runs) < 1 / (1 + math.exp(-(bias + delta))))
                thinks = going & ~reflects
                progress += thinks
                errors += thinks & (rng.random(runs) < 0.02)
                wrong = errors > 0
                errors -= reflects & wrong & (rng.random(runs) < 0.7)
                progress = np.maximum(0, progress - 4 * (reflects & ~wrong))
                answers = going & (progress >= steps)
                right |= answers & (errors == 0)
                spent, reflected = spent + going.sum(), reflected + reflects.sum()
                going &= ~answers
            rows.append({"bias": bias, "schedule": name, "right": float(right.mean()), "answered": float((~going).mean()),
                         "reflection_rate": float(reflected / spent), "tokens": float(spent / runs)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="story", help="of the parts model and adadec")
    parser.add_argument("--parts", default="zipf,toy,model,adadec,reflex")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts, out = options.parts.split(","), {}
    model, tokenizer = load(options.model) if {"model", "adadec"} & set(parts) else (None, None)
    for name, make in (("zipf", zipf), ("toy", toy), ("model", lambda: constrained(model, tokenizer)),
                       ("adadec", lambda: adadec(model, tokenizer)), ("reflex", reflex)):  # fmt: skip
        if name in parts:
            out[name] = make()
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
