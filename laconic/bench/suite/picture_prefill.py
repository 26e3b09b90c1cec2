"""The first token behind pictures, of which a ninth of the tokens stays, against the same model without laconic."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from laconic.bench.figure import Figure, Say, interleave, milliseconds
from laconic.bench.llava_slice import build_slice, prompt
from laconic.hooks import apply

GOAL = "language model >= 3.2x faster at 2,880 image tokens, overhead of every choice <= 5 % of the time that it saves"
RATIO, OVERHEAD, BUDGET = 3.2, 0.05, "11.1%"  # 3.2x is what FlowCut (2025) reports
FLOOR = "random_prune"  # a choice that costs nothing
BEFORE = (FLOOR, "vtc_cls", "hiprune", "visionzip", "divprune", "idpruner", "todre", "mmtok", "flowcut")
INSIDE = ("fastv", "pyramiddrop")
LAYERS = 32  # of the whole model


def run(quick: bool, say: Say) -> Figure:
    """One forward with a cache per method, encoder included; the headline is the language model under ``divprune``."""
    model = build_slice(quick)
    sizes = {str(n): measure(model, n, warmup, say) for n, warmup in ((1, 1), (5, 0))}  # minutes each: the first one warms up
    large = sizes["5"]
    return Figure(
        ours=large["rows"]["divprune"]["language_ms"],
        reference=large["rows"]["stock"]["language_ms"],
        target=RATIO,
        unit="ms",
        conditions={
            "overhead": all(large["rows"][name]["overhead"] <= OVERHEAD for name in BEFORE),
            "cache": all(large["rows"][name]["cache_share"] <= large["rows"][FLOOR]["cache_share"] + 1e-9 for name in BEFORE),
        },
        detail={"budget": BUDGET, "pictures": sizes, "layers": model.config.text_config.num_hidden_layers},
    )


def measure(model: torch.nn.Module, pictures: int, warmup: int, say: Say) -> dict[str, Any]:
    """Times of a prompt of so many pictures, stock and under every method.

    ``language_ms`` is the language model alone. ``whole_ms``: what the whole model of LAYERS layers would take by it: the encoder
    and the choice once, the layers as often as there are more of them. ``overhead``: what a choice costs beyond the cheapest, as
    a share of what that saves in the whole model. Methods between the layers keep more in the first ones, a larger share of
    the slice than of the whole: their ``whole_ms`` is too high, and their overhead without meaning.
    """
    batch, inside = prompt(model, pictures), {}
    spent: dict[str, list[float]] = {name: [] for name in ("stock", *BEFORE, *INSIDE)}
    held: dict[str, int] = {}
    begun = 0.0

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def forward(name: str) -> Callable[[int], None]:
        def step(_: int) -> None:
            end = language.register_forward_hook(lambda *_: spent[name].append(time.perf_counter() - begun))
            with torch.no_grad():
                cache = model(**batch, use_cache=True, logits_to_keep=1).past_key_values
            end.remove()
            held[name] = sum(layer.keys.numel() if hasattr(layer.keys, "numel") else layer.n for layer in cache.layers)

        return step

    language = model.get_decoder()
    hook = language.register_forward_pre_hook(begin)
    for name in (*BEFORE, *INSIDE):
        inside[name] = apply(model, f"{name}:{BUDGET}")
        inside[name].remove()
    ms = milliseconds(interleave({name: forward(name) for name in spent}, repeats=1, warmup=warmup, inside=inside, say=say))
    hook.remove()
    language_ms = milliseconds({name: times[warmup:] for name, times in spent.items()})
    more = LAYERS / model.config.text_config.num_hidden_layers
    whole = {name: ms[name] + (more - 1) * language_ms[name] for name in ms}
    saved = whole["stock"] - whole[FLOOR]
    rows = {
        name: {
            "first_token_ms": ms[name],
            "language_ms": language_ms[name],
            "language_ratio": language_ms["stock"] / language_ms[name],
            "whole_ms": whole[name],
            "whole_ratio": whole["stock"] / whole[name],
            "overhead": (ms[name] - ms[FLOOR]) / saved,
            "cache_share": held[name] / held["stock"],
        }
        for name in ms
    }
    return {"tokens": int(batch["input_ids"].shape[1]), "rows": rows}
