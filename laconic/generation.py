"""Text from prompts with a recipe inside the model: what ``laconic generate`` does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from laconic.decoding.constraints import Constraint, masked
from laconic.decoding.diffuse import diffuse
from laconic.decoding.diffusion import DiffusionMethod
from laconic.decoding.engine import Progress, decode, drafting
from laconic.decoding.particles import ParticleMethod, sample
from laconic.decoding.sampling import Sampling, repetition_penalty
from laconic.errors import LaconicError
from laconic.evaluation.measure import stop_ids
from laconic.recipe import Recipe

LOOK_BACK = 16  # tokens beyond the letters of a stop string that are looked at for it


def generate(
    model: str | tuple[Any, Any],
    prompt: str | Sequence[str],
    recipe: Any = "dense",
    *,
    drafter: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    penalty: float = 1.0,
    stop: Sequence[str] = (),
    constraint: Constraint | Callable[[Any], Constraint] | None = None,
    seed: int = 0,
    chat: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    stream: TextIO | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Continues ``prompt`` and returns text, counts, times and the cache's figures.

    Args:
        model: a name, path or hub id, or ``(model, tokenizer)``; a diffusion language model is run as one.
        prompt: a text, or several, which are one batch.
        recipe: what is applied, such as ``"tokenselect:256"``, or ``"tokenselect:256 + token_recycling"``, which drafts.
        drafter: the drafting method by itself, such as ``"token_recycling:24"``.
        temperature: 0 is greedy; otherwise tokens are sampled, with ``seed``, from the ``top_k`` likeliest (0: all) that make up
            the share ``top_p``.
        penalty: above 1, tokens that the text has already are less likely (the repetition penalty of CTRL, 2019).
        stop: strings that end a text; it is cut before them.
        constraint: what the answer has to satisfy, see ``laconic.decoding.constraints``, or what makes it of a tokenizer. Every
            token is one that it allows; a recipe of ``awrs`` or ``masking`` weighs whole texts.
        chat: puts the prompt into the tokenizer's chat template.
        device, dtype: see ``compare``.
        stream: where the text of a single prompt is written as it comes.
        watch: told of every step, see ``laconic.decoding.engine.Progress``.

    Returns:
        ``text`` (a list for several prompts), ``model``, ``method``, ``guarantee``, ``prompt_tokens``, ``tokens`` (new ones),
        ``prefill_s`` (until the first new token; None where many texts or masks go on together), ``decode_s`` (mean of the
        other tokens, or then of all; None when there are none), ``forwards``, ``tokens_per_forward``,
        ``accepted`` (how often 0, 1, 2 ... drafted tokens were), ``draft_s``, ``draft_bytes``,
        ``satisfied`` (whether the constraint is; None without) and ``stats`` (see ``Handle.stats``). Counts are sums over the
        prompts. With ``awrs`` or ``masking`` also ``posterior``, the probability of each text, the likeliest first.

    Raises:
        LaconicError: for a model, recipe or prompt that cannot work, or where no text satisfies the constraint.
    """
    from laconic.evaluation.workload import open_model

    recipe = _with_drafter(Recipe.parse(recipe), drafter)  # before the model is loaded, which may take long
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    processors = (repetition_penalty(penalty),) if penalty != 1 else ()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, processors=processors)
    network, tokenizer, name = open_model(model, device, dtype)
    inputs = dict(_encode(tokenizer, prompts, chat).to(next(network.parameters()).device))
    writer = _Writer(tokenizer, stream, stop) if stream is not None and len(prompts) == 1 else None
    job = _Job(network, tokenizer, inputs, recipe, sampling, max_new_tokens, tuple(stop), seed, writer, watch)
    if callable(constraint) and not isinstance(constraint, Constraint):
        constraint = constraint(tokenizer)
    rows, figures = _way(job, constraint)
    if writer is not None:
        writer.end()
    texts = [_cut(tokenizer.decode(row, skip_special_tokens=True), stop) for row in rows]
    return {
        "text": texts[0] if isinstance(prompt, str) else texts,
        "model": name,
        "method": str(recipe),
        "prompt_tokens": int(inputs["attention_mask"].sum()),
        "tokens": sum(map(len, rows)),
        **figures,
    }


@dataclass(frozen=True)
class _Job:
    """What there is to do, for the ways of doing it."""

    model: torch.nn.Module
    tokenizer: Any
    inputs: dict[str, torch.Tensor]
    recipe: Recipe
    sampling: Sampling
    most: int
    stop: tuple[str, ...]
    seed: int
    writer: _Writer | None
    watch: Callable[[Progress], None] | None


def _way(job: _Job, constraint: Constraint | None) -> tuple[list[list[int]], dict[str, Any]]:
    """New tokens of each row and the figures, by the loop that model and recipe ask for."""
    weighing = any(isinstance(m, ParticleMethod) for m in job.recipe.methods)
    filling = any(isinstance(m, DiffusionMethod) for m in job.recipe.methods)
    if filling or getattr(job.model.config.get_text_config(), "diffusion", None) is not None:
        if constraint is not None or job.stop or job.sampling.processors:
            raise LaconicError("A diffusion model writes in any order: leave constraint, stop strings and penalty out.")
        return _diffused(job)
    if weighing and constraint is None:
        raise LaconicError(f"{job.recipe} draws under a constraint: give one, such as --regex or --schema.")
    return _weighed(job, constraint) if weighing else _decoded(job, constraint)


def _decoded(job: _Job, constraint: Constraint | None) -> tuple[list[list[int]], dict[str, Any]]:
    """One token or one draft after another."""
    def tell(step: Progress) -> None:
        if job.writer is not None:
            job.writer.put(step.new[0])
        if job.watch is not None:
            job.watch(step)

    sampling, method = job.sampling, drafting(job.recipe)
    if constraint is not None:
        sampling = dataclasses.replace(sampling, processors=(*sampling.processors, masked(constraint)))
    out = decode(
        job.model, job.inputs, job.recipe, max_new_tokens=job.most, sampling=sampling, seed=job.seed,
        ends=stop_ids(job.model, job.tokenizer), stop=_stopper(job.tokenizer, job.stop), watch=tell, tokenizer=job.tokenizer,
    )  # fmt: skip
    longest = max(map(len, out.rows))
    return out.rows, {
        "guarantee": None if method is None else method.promise,
        "prefill_s": out.prefill_s,
        "decode_s": out.decode_s / (longest - 1) if longest > 1 else None,
        "forwards": out.forwards,
        "tokens_per_forward": out.tokens_per_forward,
        "accepted": out.accepted,
        "draft_s": out.draft_s,
        "draft_bytes": out.draft_bytes,
        "satisfied": None if constraint is None else all(map(constraint.accepts, out.rows)),
        "stats": out.stats,
    }


def _weighed(job: _Job, constraint: Constraint) -> tuple[list[list[int]], dict[str, Any]]:
    """The likeliest of many texts that were drawn under a constraint and weighed."""
    begun = time.perf_counter()
    sampling = job.sampling if job.sampling.temperature else dataclasses.replace(job.sampling, temperature=1.0)
    out = sample(
        job.model, job.inputs, constraint, job.recipe, max_new_tokens=job.most, sampling=sampling, seed=job.seed,
        tokenizer=job.tokenizer,
    )  # fmt: skip
    if out.best is None:
        raise LaconicError(
            f"None of {len(out.rows)} texts of up to {job.most} tokens satisfies the constraint: give more tokens or particles."
        )
    if job.writer is not None:
        job.writer.put(out.best)
    weigher = next(m for m in job.recipe.methods if isinstance(m, ParticleMethod))
    return [out.best], {
        "guarantee": weigher.guarantee,
        "prefill_s": None,
        "decode_s": (time.perf_counter() - begun) / len(out.best),
        "forwards": out.forwards,
        "tokens_per_forward": len(out.best) / out.forwards,
        "checks": out.checks,
        "satisfied": True,
        "evidence": out.evidence,
        "posterior": [
            {"text": job.tokenizer.decode(row, skip_special_tokens=True), "probability": mass}
            for row, mass in out.posterior.items()
        ],
        "stats": None,
    }


def _diffused(job: _Job) -> tuple[list[list[int]], dict[str, Any]]:
    """Masks that are filled in, many in a forward."""
    begun, shown = time.perf_counter(), 0

    def tell(step: Any, answer: torch.Tensor) -> None:
        nonlocal shown
        if job.writer is not None and step.done[0] > shown:
            job.writer.put(answer[0, shown : step.done[0]].tolist())
            shown = step.done[0]

    recipe = job.recipe
    if [m.id for m in recipe.methods] == ["dense"]:
        recipe = Recipe.parse("wedlm" if job.model.config.get_text_config().diffusion == "causal" else "full_canvas")
    out = diffuse(
        job.model, job.inputs["input_ids"], recipe, max_new_tokens=job.most, attention_mask=job.inputs["attention_mask"],
        temperature=job.sampling.temperature, generator=torch.Generator(job.model.device).manual_seed(job.seed), on_step=tell,
    )  # fmt: skip
    rows = [row[:length] for row, length in zip(out.ids.tolist(), out.lengths, strict=True)]
    return rows, {
        "guarantee": recipe.methods[0].guarantee,
        "prefill_s": None,  # a first token is nothing apart: the first forward may fill in many
        "decode_s": (time.perf_counter() - begun) / max(out.lengths),
        "forwards": out.forwards,
        "tokens_per_forward": out.tokens_per_forward,
        "rows": out.rows,
        "satisfied": None,
        "stats": None,
    }


def _with_drafter(recipe: Recipe, drafter: Any) -> Recipe:
    if drafter is None:
        return recipe
    added = Recipe.parse(drafter)
    if drafting(added) is None:
        raise LaconicError(f"{added} drafts nothing: give a drafting method, such as token_recycling (see laconic methods).")
    dense = [m for m in recipe.methods if m.id != "dense"]
    return Recipe((*dense, *added.methods))


def _encode(tokenizer: Any, prompts: list[str], chat: bool) -> Any:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise LaconicError("This model's tokenizer has no chat template: leave --chat out.")
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = tokenizer.apply_chat_template(
            talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompts, padding=len(prompts) > 1, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0 or not bool(inputs["attention_mask"].any(-1).all()):
        raise LaconicError("The prompt is empty: give at least one word.")
    return inputs


def _stopper(tokenizer: Any, stop: Sequence[str]) -> Callable[[int, list[int]], bool] | None:
    if not stop:
        return None
    reach = max(map(len, stop)) + LOOK_BACK
    return lambda row, new: any(string in tokenizer.decode(new[-reach:], skip_special_tokens=True) for string in stop)


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return text[: min((text.find(string) for string in stop if string in text), default=len(text))]


class _Writer:
    """Writes text to a stream as it comes, without what ends it."""

    def __init__(self, tokenizer: Any, stream: TextIO, stop: Sequence[str]) -> None:
        from transformers import TextStreamer

        class Words(TextStreamer):
            def on_finalized_text(words, text: str, stream_end: bool = False) -> None:
                self.text += text

        self.words, self.stream, self.stop = Words(tokenizer, skip_special_tokens=True), stream, stop
        self.hold = max(map(len, stop), default=1) - 1  # letters that may turn out to be the beginning of a stop string
        self.text, self.written = "", 0

    def put(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.words.put(torch.tensor([token]))
        self._write(len(_cut(self.text, self.stop)) - self.hold)

    def end(self) -> None:
        self.words.end()
        self._write(len(_cut(self.text, self.stop)))
        print(file=self.stream, flush=True)

    def _write(self, to: int) -> None:
        if to > self.written:
            print(self.text[self.written : to], end="", flush=True, file=self.stream)
            self.written = to


class Clock:
    """A streamer of transformers' ``generate`` that notes when the prompt and every new token came, and hands them on."""

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
