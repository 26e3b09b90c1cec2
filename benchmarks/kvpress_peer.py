"""Runs kvpress on prompts given as token ids; called by kvpress_side_by_side.py in an environment that has kvpress.

Reads one JSON object from stdin: model (path), examples (lists of ids), new_tokens, rows [{press, options, ratio}]. Writes one
JSON object per row to stdout: per example the tokens, kept positions per layer and head, seconds and bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def high_water(reset: bool = False) -> int:
    """Peak resident bytes of this process since the last reset (Linux); a reset first gives back what lies free."""
    if reset:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This comparison needs Linux: peak memory is read from /proc.")


def timed_run(forward: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Prefill and greedy decoding: ``forward(ids, first position)`` gives the logits of the last token."""
    before = high_water(reset=True)
    start = time.perf_counter()
    token = forward(ids, 0).argmax(-1)
    prefill = time.perf_counter() - start
    tokens = [int(token)]
    start = time.perf_counter()
    for i in range(new_tokens - 1):
        token = forward(token.view(1, 1), ids.shape[1] + i).argmax(-1)
        tokens.append(int(token))
    decode = (time.perf_counter() - start) / max(1, new_tokens - 1)
    return {"tokens": tokens, "prefill_s": prefill, "decode_s": decode, "peak_bytes": high_water() - before}


def build(name: str, options: dict[str, Any], ratio: float) -> Any:
    """A press by class name; ``{"press": ...}`` among the options is built too, and then carries the ratio."""
    import kvpress

    if "gates" in options:
        return _fixed_heads(options)
    if "press" in options:
        inner = options["press"]
        return getattr(kvpress, name)(press=build(inner["name"], inner["options"], ratio))
    return getattr(kvpress, name)(compression_ratio=ratio, **options)


def _fixed_heads(options: dict[str, Any]) -> Any:
    """DuoAttention with given gates, the best ``heads`` of which keep everything: kvpress has patterns of a few models only."""
    import kvpress

    class Fixed(kvpress.DuoAttentionPress):
        def post_init_from_model(self, model: Any) -> None:
            gates = torch.tensor(options["gates"])
            self.sink_size, self.recent_size = options["sink_size"], options["recent_size"]
            self.streaming_mask = gates < gates.flatten().topk(options["heads"]).values[-1]

    return Fixed()


def scorer(press: Any) -> Any:
    return getattr(press, "press", press)


def run_row(model: Any, row: dict[str, Any], examples: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """All examples under one press."""
    from transformers import DynamicCache

    results = []
    for ids in examples:
        press = build(row["press"], row["options"], row["ratio"])
        scores: dict[int, torch.Tensor] = {}
        inner = scorer(press)
        original = getattr(inner, "score", None)

        def record(module: Any, *args: Any, original: Any = original, scores: Any = scores) -> torch.Tensor:
            scores[module.layer_idx] = found = original(module, *args)
            return found

        if original is not None:
            object.__setattr__(inner, "score", record)
        cache = DynamicCache()
        prompt = torch.tensor([ids])

        def forward(new: torch.Tensor, at: int, cache: Any = cache, press: Any = press) -> torch.Tensor:
            positions = torch.arange(at, at + new.shape[1])[None]
            with torch.no_grad():
                if at:
                    return model(new, past_key_values=cache, position_ids=positions).logits[:, -1]
                with press(model):
                    return model(new, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits[:, -1]

        result = timed_run(forward, prompt, new_tokens)
        kept = []
        for i, layer in enumerate(model.model.layers):
            masked = getattr(layer.self_attn, "masked_key_indices", None)
            if masked is not None:  # heads of different lengths are not shortened, only masked
                gone = {(int(h), int(s)) for h, s in zip(masked[1], masked[2], strict=True)}
                heads = cache.layers[i].keys.shape[1]
                kept.append([[s for s in range(len(ids)) if (h, s) not in gone] for h in range(heads)])
                layer.self_attn.masked_key_indices = None
            else:
                count = cache.layers[i].keys.shape[2] - (new_tokens - 1)
                kept.append(scores[i].topk(count, dim=-1).indices.sort(-1).values[0].tolist())
        results.append({**result, "kept": kept})
    return {**row, "examples": results}


def main() -> None:
    """Command line entry: JSON in, JSON lines out."""
    from transformers import AutoModelForCausalLM

    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    for row in [job["rows"][0], *job["rows"]]:  # once to warm up
        print(json.dumps(run_row(model, row, job["examples"], job["new_tokens"])), flush=True)


if __name__ == "__main__":
    main()
