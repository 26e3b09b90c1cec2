"""Text from a prompt with a recipe inside the model: what ``laconic generate`` does."""

from __future__ import annotations

import time
from typing import Any, TextIO

import torch

from laconic.errors import LaconicError


def generate(
    model: str | tuple[Any, Any],
    prompt: str,
    recipe: Any = "dense",
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Continues ``prompt`` and returns text, counts, times and the cache's figures.

    Args:
        model: a name, path or hub id, or ``(model, tokenizer)``.
        recipe: what is applied, such as ``"tokenselect:256"``.
        temperature: 0 is greedy; otherwise tokens are sampled, with ``seed``.
        chat: puts the prompt into the tokenizer's chat template.
        device, dtype: see ``compare``.
        stream: where the text is written as it comes.

    Returns:
        ``text``, ``model``, ``method``, ``prompt_tokens``, ``tokens`` (new ones), ``prefill_s`` (until the first new
        token), ``decode_s`` (mean of the others; None when there are none) and ``stats`` (see ``Handle.stats``).

    Raises:
        LaconicError: for a model, recipe or prompt that cannot work.
    """
    from laconic import Recipe, apply
    from laconic.evaluation.workload import open_model

    recipe = Recipe.parse(recipe)  # before the model is loaded, which may take long
    network, tokenizer, name = open_model(model, device, dtype)
    inputs = _encode(tokenizer, prompt, chat).to(next(network.parameters()).device)
    clock = Clock(_writer(tokenizer, stream))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    with apply(network, recipe) as handle:
        out = network.generate(**inputs, max_new_tokens=max_new_tokens, streamer=clock, **sampling)
        stats = handle.stats()
    new = out[0, inputs["input_ids"].shape[1] :]
    times = clock.times
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "model": name,
        "method": str(recipe),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "tokens": len(new),
        "prefill_s": times[1] - times[0],
        "decode_s": (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else None,
        "stats": stats,
    }


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise LaconicError("This model's tokenizer has no chat template: leave --chat out.")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise LaconicError("The prompt is empty: give at least one word.")
    return inputs


def _writer(tokenizer: Any, stream: TextIO | None) -> Any:
    """A streamer that writes text to ``stream`` as it comes."""
    if stream is None:
        return None
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, flush=True, end="\n" if stream_end else "", file=stream)

    return Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class Clock:
    """A streamer of ``generate`` that notes when the prompt and every new token came, and hands them on."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(tokens)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()
