"""How much of the attention a search finds for the bytes that it reads: every known search, and settings of ours between them."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from laconic import kernels
from laconic.attention import engine
from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.bench.figure import Figure, Say, interleave, milliseconds
from laconic.cache import KVCache, KVLayer
from laconic.profiles import ZOO
from laconic.recipe import Recipe
from laconic.selection import Selection

GOAL = "for each published search, a setting that finds as much of the best tokens' attention for fewer bytes"
PAPERS = {  # as published; 8-bit keys are not part of any of them
    "quest": "quest", "hisa": "hisa", "fasa": "fasa(profile={fasa})", "tokenselect": "tokenselect(refresh=2)",
}  # fmt: skip
SHARE, ENDS = 0.05, 20  # of the tokens are read; that many first and newest ones in any case


def run(quick: bool, say: Say) -> Figure:
    """The headline: the fewest bytes of a published search that finds 99 % or the most, against ours that finds as much."""
    cases = [needle_case(512)] if quick else [needle_case(4096), needle_case(8192), made_up_case(32_768)]
    tables = [measure(name, layers, quick, say) for name, layers in cases]
    main = tables[min(1, len(tables) - 1)]
    enough = min(0.99, max(row["recall"] for row in main["rows"] if row["paper"]))
    reference = min((r for r in main["rows"] if r["paper"] and r["recall"] >= enough), key=lambda r: r["bytes"])
    ours = min((r for r in main["rows"] if not r["paper"] and r["recall"] >= enough), key=lambda r: r["bytes"], default=reference)
    return Figure(
        ours=ours["bytes"],
        reference=reference["bytes"],
        target=1.0,
        unit="bytes per step",
        conditions={f"{table['case']}_all_beaten": all(table["beaten_by"].values()) for table in tables},
        detail={"ours": ours["recipe"], "reference": reference["recipe"], "share_read": SHARE, "cases": tables},
    )


def settings() -> list[str]:
    """Recipes of ours: two and three stages, from coarse to fine."""
    found = []
    for block, over in itertools.product((8, 16, 32, 64), (1.5, 2, 4, 8)):
        found += [
            f"coarse_to_fine(block={block}, block_oversample={over})",
            f"coarse_to_fine(block={block}, block_oversample={over}, int8=false, exact=true)",
        ]
    found += [f"coarse_to_fine(block={b}, int8=false)" for b in (8, 16, 32, 64)]
    found += [
        "coarse_to_fine(block=0)",
        "coarse_to_fine(block=0, int8_oversample=2, exact=true)",
        "coarse_to_fine(block=32, block_oversample=8, int8_oversample=1.5, exact=true)",
    ]
    return found


Layers = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # query (1, heads, 1, d), keys and values (1, kv_heads, n, d)


def needle_case(length: int) -> tuple[str, Layers]:
    """The last query and all keys of every layer of the built-in model, at the end of a prompt that asks for a fact."""
    import laconic
    from laconic.evaluation.tasks import load_task

    model, tokenizer = laconic.load("needle")
    prompt = load_task("needle", tokenizer, lengths=[length], samples=1).examples[0].prompt
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    seen: dict[int, Any] = {}

    class Look(Policy):
        def attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
            seen[layer.index] = (call.query[:, :, -1:].clone(), layer.keys.clone(), layer.values.clone())
            return super().attend(layer, call)

    with laconic.apply(model, "dense") as handle, torch.no_grad():
        handle.policy = Look(Recipe.parse("dense").methods)
        model(ids, use_cache=True, logits_to_keep=1)
    return f"needle_{length}", [seen[i] for i in sorted(seen)]


def made_up_case(length: int) -> tuple[str, Layers]:
    """Keys in stretches around one of many centres, and queries that look for a few of these: 32/8 heads x 128."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(256, 8, 128, generator=generator)
    lengths = torch.randint(8, 120, (length // 32,), generator=generator)
    which = torch.randint(256, (len(lengths),), generator=generator).repeat_interleave(lengths)[:length]
    keys = 0.6 * centres[which].transpose(0, 1) + 0.8 * torch.randn(8, length, 128, generator=generator)
    wanted = centres[torch.randint(256, (3,), generator=generator)].sum(0)
    query = wanted.repeat_interleave(4, 0) + 0.5 * torch.randn(32, 128, generator=generator)
    values = torch.randn(8, length, 128, generator=generator)
    return f"made_up_{length}", [(query[None, :, None], keys[None], values[None])]


def measure(name: str, layers: Layers, quick: bool, say: Say) -> dict[str, Any]:
    """All recipes on one case: recall, bytes and time per step, what lies on the front, and what beats each published search."""
    n = layers[0][1].shape[2]
    budget = max(ENDS + 4, round(SHARE * n))
    recipes: dict[str, str | None] = {
        text.format(fasa=ZOO / "needle" / "profiles" / "fasa.json"): label
        for label, text in PAPERS.items()
        if label != "fasa" or "needle" in name  # made-up keys have no profile
    }
    recipes |= dict.fromkeys(settings()[:: 8 if quick else 1])
    rows = [_row(f"{text}:{budget}", label, layers, quick) for text, label in recipes.items()]
    for row in rows:
        row["front"] = not any(
            other["recall"] >= row["recall"] and other["bytes"] < row["bytes"] and other is not row for other in rows
        )
    beaten_by = {}
    for paper in (row for row in rows if row["paper"]):
        better = [r for r in rows if not r["paper"] and r["recall"] >= paper["recall"] - 1e-6 and r["bytes"] < paper["bytes"]]
        beaten_by[paper["paper"]] = min(better, key=lambda r: r["bytes"])["recipe"] if better else None
    say(f"{name}: {sum(row['front'] for row in rows)} of {len(rows)} on the front; beaten: {beaten_by}")
    dense = sum(k.numel() + v.numel() for _, k, v in layers) * 4
    return {"case": name, "tokens": n, "budget": budget, "dense_bytes": dense, "rows": rows, "beaten_by": beaten_by}


def _row(recipe: str, paper: str | None, layers: Layers, quick: bool) -> dict[str, Any]:
    cache = KVCache(len(layers))
    policy = cache.request.policy = Policy(Recipe.parse(recipe).methods)
    for index, (_, keys, values) in enumerate(layers):
        cache.update(keys, values, index)
        cache.layers[index].memory["prompt"] = cache.layers[index].lengths.clone()
    found: list[float] = []

    def step(_: int) -> None:
        for layer, (query, keys, _) in zip(cache.layers, layers, strict=True):
            policy.attend(layer, Call(query, keys.shape[-1] ** -0.5))

    with _watched() as chosen:
        step(0)
    for slots, layer, (query, keys, _) in zip(chosen, cache.layers, layers, strict=True):
        found.append(recall(query[:, :, 0], keys, slots.expand(-1, layer.heads, -1), int(recipe.rsplit(":", 1)[1])))
    ms = milliseconds(interleave({"step": step}, repeats=1 if quick else 5))["step"]
    read = sum(figure["bytes_read"] for figure in cache.request.figures.values())
    return {"recipe": recipe, "paper": paper, "recall": sum(found) / len(found), "bytes": read, "ms": ms}


class _watched:
    """Notes the slots of every partial read."""

    def __enter__(self) -> list[torch.Tensor]:
        self.seen: list[torch.Tensor] = []
        self.original = engine._entries

        def entries(layer: KVLayer, call: Call, selection: Selection | None) -> Any:
            self.seen.append(selection.indices)
            return self.original(layer, call, selection)

        engine._entries = entries
        return self.seen

    def __exit__(self, *_: object) -> None:
        engine._entries = self.original


def recall(query: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, budget: int) -> float:
    """Attention mass of ``slots`` (1, kv_heads, k) over that of the best ``budget`` tokens of each KV head, mean over heads."""
    votes = kernels.vote(query, keys, scale=keys.shape[-1] ** -0.5, over="group")
    best = votes.gather(-1, kernels.topk(votes, budget)).sum(-1)
    mine = votes.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0.0).sum(-1)
    return float((mine / best).mean())
