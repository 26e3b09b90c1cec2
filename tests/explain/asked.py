"""Questions about pictures for tiny random models: prompts of tests/vlm.py, with answers written as numbers of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import vlm

from laconic.evaluation.examples import Example, Task
from laconic.evaluation.measure import Item
from laconic.evaluation.workload import Work


class Numbers:
    """A tokenizer whose words are the numbers of tokens."""

    eos_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    def decode(self, tokens: list[int], **_: object) -> str:
        return " ".join(map(str, tokens))


READER = SimpleNamespace(tokenizer=Numbers(), image_processor=object())


def work(family: str, answers: list[str], kinds: list[str] | None = None, tokens: int = 3) -> Work:
    """One question per answer, each about its own picture."""
    items, examples = [], []
    for seed, answer in enumerate(answers):
        x = vlm.inputs(family, (1,), seed=seed)
        ids = x.pop("input_ids")[0].tolist()
        meta = {"type": kinds[seed]} if kinds else {}
        examples.append(Example("5", answer, max_new_tokens=tokens, meta=meta, pictures=("made up",)))
        items.append(Item(examples[-1], ids, len(ids), tokens, inputs=x))
    return Work(Task("made", "exact", examples), items, [])


def greedy(family: str, seed: int = 0, tokens: int = 3) -> str:
    """What the dense model answers to a question of ``work``."""
    x = vlm.inputs(family, (1,), seed=seed)
    with torch.no_grad():
        ids = vlm.build(family).generate(**x, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return READER.tokenizer.decode(ids[0, -tokens:].tolist())
