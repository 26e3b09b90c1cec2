"""How much of the attention a search finds for the bytes that it reads: every known search, and settings of ours between them."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic import kernels
from laconic.attention import fasa
from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.attention.probe import Probe
from laconic.attention.rope import Rope
from laconic.bench.figure import Figure, Say
from laconic.cache import KVCache, KVLayer
from laconic.profiles import ZOO, Profile
from laconic.recipe import Recipe
from laconic.selection import Selection

GOAL = "for each published search, a setting that finds as much of the best tokens' attention for fewer bytes"
KNOWN = {
    "quest": "quest", "hisa": "hisa", "fasa": "fasa(profile={fasa})", "tokenselect": "tokenselect(refresh=2)",
    "tokenselect, int8": "tokenselect(refresh=2, int8=true)",
}  # fmt: skip
UNPUBLISHED = ("tokenselect, int8",)  # the bytes are this project's: marked, but no demand
SHARE, ENDS = 0.05, 20  # of the tokens are read; that many first and newest ones in any case
TEXTS, STEPS = 3, 6  # prompts of a length, and their last tokens, each of which is a decode step

Layers = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # query (1, heads, n, d), keys and values (1, kv_heads, n, d)


@dataclass(frozen=True)
class Case:
    """Texts as the attention layers of a model see them. Of queries, those of the last ``steps`` tokens are enough.

    Attributes:
        profile: a file with the dominant pairs of its layers.
    """

    name: str
    texts: list[Layers]
    steps: int
    profile: Path

    @property
    def tokens(self) -> int:
        """Of the first text; others of a case differ by a few."""
        return self.texts[0][0][1].shape[2]


def run(quick: bool, say: Say) -> Figure:
    """The headline: the fewest bytes of a published search that finds 99 % or the most, against ours that finds as much."""
    with tempfile.TemporaryDirectory(prefix="laconic-bench-") as folder:
        if quick:
            cases = [needle_case(512, texts=1, steps=2), made_up_case(1024, Path(folder), heads=4, kv_heads=2, dim=32)]
        else:
            cases = [needle_case(4096), needle_case(8192), made_up_case(32_768, Path(folder))]
        tables = [measure(case, settings()[:: 8 if quick else 1], say) for case in cases]
    main = tables[0 if quick else 1]
    published = [row for row in main["rows"] if row["known"] not in (None, *UNPUBLISHED)]
    enough = min(0.99, max(row["recall"] for row in published))
    reference = min((row for row in published if row["recall"] >= enough), key=lambda row: row["bytes"])
    found = (row for row in main["rows"] if row["known"] is None and row["recall"] >= enough)
    ours = min(found, key=lambda row: row["bytes"], default=reference)
    return Figure(
        ours=ours["bytes"],
        reference=reference["bytes"],
        target=1.0,
        unit="bytes per step",
        conditions={
            f"{table['case']}_all_beaten": all(by for name, by in table["beaten_by"].items() if name not in UNPUBLISHED)
            for table in tables
        },
        detail={"ours": ours["recipe"], "reference": reference["recipe"], "share_read": SHARE, "cases": tables},
    )


def settings() -> list[str]:
    """Recipes of ours, one to three stages from coarse to fine; ``{fasa}`` is the profile."""
    found = []
    for block, over in itertools.product((8, 16, 32, 64), (1.5, 2, 4, 8)):
        found += [f"block={block}, block_oversample={over}", f"block={block}, block_oversample={over}, int8=false, exact=true"]
    found += [f"block={block}, int8=false" for block in (8, 16, 32, 64)]
    found += ["block=0", "block=0, int8_oversample=2, exact=true"]
    found += ["block=32, block_oversample=8, int8_oversample=1.5, exact=true"]
    for block, pairs in itertools.product((0, 32, 64), (4, 8)):
        blocks = f"block={block}" + (", block_oversample=8" if block else "")
        few = f"pairs={pairs}, profile={{fasa}}"
        found += [f"{blocks}, int8=false, {few}", f"{blocks}, int8=false, {few}, pairs_oversample=3, exact=true"]
        found += [f"{blocks}, int8_oversample=3, {few}"]
    return [f"coarse_to_fine({text})" for text in found]


def needle_case(length: int, texts: int = TEXTS, steps: int = STEPS) -> Case:
    """The built-in model's own queries, keys and values of prompts that ask for a fact, in all of its layers."""
    found = seen_layers("needle", "needle", length, texts)
    return Case(f"needle_{length}", found, steps, ZOO / "needle" / "profiles" / "fasa.json")


def seen_layers(model: str, task: str, length: int, texts: int) -> list[Layers]:
    """What the attention layers of a built-in ``model`` see of so many prompts of a ``task``, of ``length`` tokens at most."""
    import laconic
    from laconic.evaluation.tasks import load_task

    loaded, tokenizer = laconic.load(model)

    class Look(Probe):
        def look(self, layer: KVLayer, call: Call) -> None:
            self.found[layer.index] = call.query.clone(), layer.keys.clone(), layer.values.clone()

    examples = load_task(task, tokenizer, lengths=[length], samples=texts).examples
    texts = [tokenizer(example.prompt, return_tensors="pt")["input_ids"][:, :length] for example in examples]
    return [Look().read(loaded, ids).layers for ids in texts]


def made_up_case(
    length: int, folder: Path, *, heads: int = 32, kv_heads: int = 8, dim: int = 128, steps: int = STEPS
) -> Case:
    """Keys in stretches around one of 256 centres, queries that look for three of these, all turned by their positions.

    The profile is measured on as many other queries.
    """
    generator = torch.Generator().manual_seed(0)
    rope = Rope(500_000.0 ** (-torch.arange(dim // 2) / (dim // 2)))
    centres = torch.randn(256, kv_heads, dim, generator=generator)
    lengths = torch.randint(8, 120, (length // 8,), generator=generator)
    which = torch.randint(256, (len(lengths),), generator=generator).repeat_interleave(lengths)[:length]
    keys = 0.6 * centres[which].transpose(0, 1) + 0.8 * torch.randn(kv_heads, length, dim, generator=generator)
    values = torch.randn(kv_heads, length, dim, generator=generator)

    def queries() -> torch.Tensor:
        wanted = centres[torch.randint(256, (steps, 3), generator=generator)].sum(1).transpose(0, 1)
        query = wanted.repeat_interleave(heads // kv_heads, 0) + 0.5 * torch.randn(heads, steps, dim, generator=generator)
        return rope.rotate(query, torch.arange(length - steps, length))

    keys = rope.rotate(keys, torch.arange(length))
    ranking = fasa.pair_agreement(queries(), keys, rope.layout).argsort(dim=-1, descending=True)
    Profile("fasa", {}, 0, "", {"rope": rope.layout, "ranking": [ranking.tolist()]}).save(folder / "fasa.json")
    return Case(f"made_up_{length}", [[(queries()[None], keys[None], values[None])]], steps, folder / "fasa.json")


class Watch(Policy):
    """Notes the slots that a recipe's reader chose."""

    def _select(self, layer: KVLayer, call: Call) -> Selection | None:
        self.selection = super()._select(layer, call)
        return self.selection


def measure(case: Case, ours: list[str], say: Say) -> dict[str, Any]:
    """All recipes on one case: recall, bytes and time per step, what lies on the front, and what beats each known search."""
    budget = max(ENDS + 4, round(SHARE * case.tokens))
    known = {f"{text.format(fasa=case.profile)}:{budget}": name for name, text in KNOWN.items()}
    recipes = known | dict.fromkeys(f"{text.format(fasa=case.profile)}:{budget}" for text in ours)
    policies = {recipe: Watch(Recipe.parse(recipe).methods) for recipe in recipes}
    seen: dict[str, list[tuple[float, int, float]]] = {recipe: [] for recipe in recipes}
    for layer, call in decode_steps(case.texts, case.steps):
        best = best_attention(layer, call, budget)
        for recipe, policy in policies.items():
            seen[recipe].append(_step(policy, layer, call, best))
    rows = [_row(recipe.replace(str(case.profile), "FILE"), known.get(recipe), case, seen[recipe]) for recipe in recipes]
    for row in rows:
        row["front"] = not any(
            other["recall"] >= row["recall"] and other["bytes"] < row["bytes"] for other in rows if other is not row
        )
    beaten_by = {row["known"]: beaten(row, rows) for row in rows if row["known"]}
    say(f"{case.name}: {sum(row['front'] for row in rows)} of {len(rows)} on the front; beaten: {beaten_by}")
    return {
        "case": case.name, "tokens": case.tokens, "texts": len(case.texts), "steps": case.steps, "budget": budget,
        "dense_bytes": 4 * sum(keys.numel() + values.numel() for _, keys, values in case.texts[0]),
        "rows": rows, "beaten_by": beaten_by,
    }  # fmt: skip


def decode_steps(texts: list[Layers], steps: int) -> Iterator[tuple[KVLayer, Call]]:
    """The last ``steps`` tokens of every text, one at a time and layer by layer: what is held then, and the call."""
    for layers in texts:
        cache, n = KVCache(len(layers)), layers[0][1].shape[2]
        for at in range(n - steps, n):
            for layer, (query, keys, values) in zip(cache.layers, layers, strict=True):
                layer.update(keys[:, :, layer.seen : at + 1], values[:, :, layer.seen : at + 1])
                place = at - n + query.shape[2]
                yield layer, Call(query[:, :, place : place + 1], keys.shape[-1] ** -0.5)


def _step(policy: Watch, layer: KVLayer, call: Call, best: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, int, float]:
    """Recall, bytes and seconds of a decode step in one layer: the second of two, for the first makes what is kept beside it."""
    layer.request.policy = policy
    layer.tracks.pop(fasa.TRACK, None)  # of other pairs
    policy.attend(layer, call)
    start = time.perf_counter()
    policy.attend(layer, call)
    seconds = time.perf_counter() - start
    return recall(policy.selection.indices, *best), layer.request.figures[layer.index]["bytes_read"], seconds


def _row(recipe: str, known: str | None, case: Case, seen: list[tuple[float, int, float]]) -> dict[str, Any]:
    """Means over texts, steps and layers; bytes of a step in all layers, the median ms of one layer."""
    found, read, seconds = zip(*seen, strict=True)
    steps = case.steps * len(case.texts)
    return {
        "recipe": recipe, "known": known, "recall": statistics.mean(found), "bytes": sum(read) / steps,
        "ms": 1e3 * statistics.median(seconds),
    }  # fmt: skip


def best_attention(layer: KVLayer, call: Call, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every token, summed over the heads of a group, ``(1, kv_heads, n)``, and that of the ``budget`` best."""
    votes = kernels.vote(call.last, layer.keys, scale=call.scale, over="group")
    return votes, votes.gather(-1, kernels.topk(votes, budget)).sum(-1)


def recall(slots: torch.Tensor, votes: torch.Tensor, best: torch.Tensor) -> float:
    """Attention of ``slots`` (1, kv_heads or 1, k), -1 for none, over that of the best, mean over the KV heads."""
    slots = slots.expand(-1, votes.shape[1], -1)
    mine = votes.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0.0).sum(-1)
    return float((mine / best).mean())


def beaten(row: dict[str, Any], rows: list[dict[str, Any]]) -> str | None:
    """The recipe of ours that finds at least as much for the fewest bytes, if these are fewer; None where there is none."""
    better = [r for r in rows if r["known"] is None and r["recall"] >= row["recall"] and r["bytes"] < row["bytes"]]
    return min(better, key=lambda r: r["bytes"])["recipe"] if better else None
