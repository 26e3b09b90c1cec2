"""Texts to calibrate on, as token ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from laconic.errors import LaconicError, quote
from laconic.evaluation import metrics, template_tasks
from laconic.evaluation.answers import RIGHT
from laconic.evaluation.examples import Example, Task
from laconic.evaluation.haystack import read_text, reference_text
from laconic.evaluation.measure import Runner, prepare
from laconic.evaluation.tasks import load_task
from laconic.models.reading import read, sees, text_side


def text_samples(tokenizer: Any, text: Path | None, tokens: int, samples: int) -> list[torch.Tensor]:
    """``samples`` stretches of ``tokens`` ids, spread over a UTF-8 file or the built-in text.

    Each begins with the token that the tokenizer puts before a text, if it puts one: models are used to it, and sleep on it.
    """
    ids = tokenizer(read_text(text) if text else reference_text(), return_tensors="pt")["input_ids"][0]
    if len(ids) < tokens:
        raise LaconicError(f"The text has {len(ids)} tokens only: give a longer one, or --tokens {len(ids)}.")
    step = max(1, (len(ids) - tokens) // samples)
    stretches = [ids[i * step : i * step + tokens] for i in range(samples) if i * step + tokens <= len(ids)]
    if int(ids[0]) == tokenizer.bos_token_id:
        stretches[1:] = [torch.cat([ids[:1], stretch[:-1]]) for stretch in stretches[1:]]
    return stretches


def calibration_pictures(reader: Any, task: str, samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """The inputs of the prompts of a task that shows pictures."""
    return [read(reader, example.prompt, example.pictures) for example in _pictured(reader, task, samples, seed).examples]


def answered_pictures(
    model: torch.nn.Module, reader: Any, task: str, samples: int, seed: int
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Those prompts of a task that shows pictures which the model answers right: their inputs, and the token ids that it answers
    with, the end mark not among them."""
    made = _pictured(reader, task, samples, seed)
    runner, texts, answers = Runner(model, reader), [], []
    for item in prepare([example for example in made.examples if example.answer is not None], reader):
        said = [token for token in runner.run(item).forced if token not in runner.stop]
        example = item.example
        if said and metrics.score(made.metric, runner.text(said), example.answer, example.choices) >= RIGHT:
            texts.append({"input_ids": torch.tensor([item.ids]), **item.inputs})
            answers.append(torch.tensor(said))
    if not texts:
        raise LaconicError(f"The model answers none of the {len(made.examples)} prompts of {task} right: give more --samples.")
    return texts, answers


def _pictured(reader: Any, task: str, samples: int, seed: int) -> Task:
    """The examples of a task that show pictures."""
    if not sees(reader):
        raise LaconicError("This method calibrates on pictures, and the model reads text only: use one that sees.")
    made = load_task(task, text_side(reader), samples=samples, seed=seed)
    examples = [example for example in made.examples if example.pictures]
    if not examples:
        raise LaconicError(f"The task {task} shows no pictures: use shapes_vqa, or a JSONL file with 'image' in its lines.")
    return dataclasses.replace(made, examples=examples)


def calibration_texts(
    tokenizer: Any, text: Path | None, task: str, tokens: int, samples: int, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Stretches of a file; without one, prompts of a task, whose ends ask for something in the text, and their answers.

    A task file brings its own lengths, and so do the templates. There are answers, the token ids that go on from each prompt,
    where every example has one and it is a text, not a pattern.
    """
    if text is not None:
        return text_samples(tokenizer, text, tokens, samples), None
    lengths = None if task.endswith((".jsonl", ".ndjson")) or task in template_tasks.TASKS else [tokens]
    made = load_task(task, tokenizer, lengths=lengths, samples=samples, seed=seed)
    if not made.examples:
        raise LaconicError(f"The task {task} has no examples: give at least one line with a prompt.")
    known = made.metric not in (None, "regex", "perplexity") and all(e.answer is not None for e in made.examples)
    pairs = [_pair(tokenizer, example, known) for example in made.examples]
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs] if known else None


def answer_ids(reader: Any, example: Example) -> torch.Tensor:
    """Token ids ``(a,)`` of an example's answer, or of its first, behind its prompt; in a chat the reply begins anew."""
    tokenizer = text_side(reader)
    if example.pictures and getattr(reader, "chat_template", None):
        answer = example.answer if isinstance(example.answer, str) else example.answer[0]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            raise LaconicError(f"The answer {quote(answer)} has no tokens: give a text.")
        return torch.tensor(ids)
    return _pair(tokenizer, example, True)[1]


def _pair(tokenizer: Any, example: Example, known: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of a prompt and of its answer; a token that belongs to both is the answer's."""
    prompt = tokenizer(example.prompt, return_tensors="pt")["input_ids"][0]
    if not known:
        return prompt, prompt[:0]
    answer = example.answer if isinstance(example.answer, str) else example.answer[0]
    space = "" if example.prompt[-1:].isspace() else " "
    whole = tokenizer(example.prompt + space + answer, return_tensors="pt")["input_ids"][0]
    common = min(len(prompt), len(whole) - 1)
    differs = (prompt[:common] != whole[:common]).nonzero()
    common = int(differs[0]) if len(differs) else common
    return whole[:common], whole[common:]
