"""FLASH on descriptions of scenes: what the drafter sees of a picture, and how many tokens it foretells at once.

    python benchmarks/flash.py > flash.json
    python -m laconic.decoding.train_flash --model shapes-captions --view all --output all.json
    python benchmarks/flash.py all.json ... > flash.json

The built-in model is measured with the drafter that comes with it, and with others that are given.

Every recipe writes the same descriptions of held-out scenes, greedily, and drafts equally many tokens in a forward; the texts are
checked to be the same. ``right`` is the share of descriptions without a mistake. Times of the picture and of what follows are
apart: no drafter changes the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

from laconic.bench.run import machine
from laconic.decoding.engine import Decoded, decode
from laconic.decoding.flash_net import FlashNet
from laconic.decoding.train_flash import scene_prompts
from laconic.models import load
from laconic.models.scenes import make_scene
from laconic.models.train_captions import describe
from laconic.profiles import Profile

MODEL = "shapes-captions"
SEED = 12_000_000  # of scenes that neither the models nor the drafters have learned from


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profiles", nargs="*", type=Path, help="drafters made by train_flash")
    parser.add_argument("--model", default=MODEL, help="a model made by laconic.models.train_captions")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--nodes", type=int, default=8, help="tokens drafted in a forward")
    parser.add_argument("--depth", type=int, default=4, help="how far ahead flash_sd drafts")
    parser.add_argument("--tokens", type=int, default=80, help="the longest description")
    parser.add_argument("--pruning", default="divprune:11%", help="a recipe for pictures, which the drafters are run with too")
    options = parser.parse_args()
    model, reader = load(options.model)
    prompts = list(scene_prompts(reader, SEED, options.scenes))
    rng = np.random.default_rng(SEED)
    true = [describe(make_scene(rng)).answer for _ in prompts]  # of the same scenes
    drafts = {"dense": ""} | {name: f"{name}:{options.nodes}" for name in ("prompt_lookup", "token_recycling")}
    profiles = {path.stem: Profile.load(path).tables["form"] for path in options.profiles}
    drafts |= {path.stem: f"flash_sd(profile={path},depth={options.depth}):{options.nodes}" for path in options.profiles}
    if options.model == MODEL:
        drafts["flash_sd"] = f"flash_sd(depth={options.depth}):{options.nodes}"
    rows = []
    for pruning in ("", options.pruning):
        texts: list[Any] = []
        for name, draft in drafts.items():
            recipe = " + ".join(filter(None, (pruning, draft))) or "dense"
            row, said = measure(model, prompts, recipe, options.tokens)
            texts.append(said)
            right = [reader.tokenizer.decode(ids, skip_special_tokens=True) == text for ids, text in zip(said, true, strict=True)]
            about = {"name": name, "pruning": pruning or None, "form": profiles.get(name), "right": statistics.mean(right)}
            rows.append({**about, **row, "same_text": said == texts[0]})
    settings = {key: getattr(options, key) for key in ("scenes", "nodes", "depth", "tokens")}
    print(json.dumps({**settings, "rows": rows, "machine": machine()}, indent=2))


def measure(model: torch.nn.Module, prompts: list[dict], recipe: str, tokens: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Figures of one recipe over all prompts, and what was written."""
    runs: list[Decoded] = []
    passes: list[int] = []  # entries in each pass of the drafter's network

    def count(module: torch.nn.Module, args: tuple, _: Any) -> None:
        if isinstance(module, FlashNet):
            passes.append(args[0].shape[1])

    hook = register_module_forward_hook(count)
    for prompt in prompts:
        runs.append(decode(model, prompt, recipe, max_new_tokens=tokens, ends=[model.generation_config.eos_token_id]))
    hook.remove()
    deepest = max(len(run.accepted) for run in runs)
    accepted = [sum(run.accepted[i] for run in runs if i < len(run.accepted)) for i in range(deepest)]
    steps, written = sum(accepted), sum(len(run.rows[0]) for run in runs)
    reached = [sum(accepted[i:]) for i in range(len(accepted))]
    return {
        "tokens": written,
        "tokens_per_forward": round((written - len(runs)) / steps, 3),
        "accepted_by_depth": [round(after / before, 3) for before, after in pairwise(reached)],
        "draft_passes_per_forward": round(len(passes) / steps, 2),
        "draft_entries": sum(passes),
        "prefill_ms": round(1e3 * statistics.median(run.prefill_s for run in runs), 1),
        "decode_ms_per_token": round(1e3 * sum(run.decode_s for run in runs) / (written - len(runs)), 2),
        "draft_ms_per_token": round(1e3 * sum(run.draft_s for run in runs) / (written - len(runs)), 2),
        "draft_bytes": max(run.draft_bytes for run in runs),
    }, [run.rows[0] for run in runs]


if __name__ == "__main__":
    main()
