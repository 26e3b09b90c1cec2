"""Profiles of trained drafters with random weights, for tiny models, and tiny models that know a text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from laconic.decoding.distill import descend
from laconic.profiles import Profile, fingerprint, weights_to_json
from tests import tiny

ACCURACY = [[0.5, 0.15, 0.1, 0.05], [0.4, 0.1, 0.05, 0.05], [0.3, 0.1, 0.05, 0.0]]


def random_profile(method: str, model: torch.nn.Module, folder: Path, seed: int = 0) -> str:
    """The path of a profile of three prompt tokens or heads."""
    width = model.config.hidden_size
    torch.manual_seed(seed)
    heads = {"weight": (3, width, width), "bias": (3, width)}
    shapes = {"prompts": (3, width)} if method == "parallel_prompt_decoding" else heads
    weights = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
    tables: dict[str, Any] = {
        "weights": weights_to_json(weights), "accuracy": ACCURACY, "seconds": [(1, 1.0), (8, 1.1), (16, 2.0), (32, 9.0)],
    }  # fmt: skip
    path = folder / f"{method}-{fingerprint(model)['weights']}.json"
    Profile(method, fingerprint(model), seed, "", tables).save(path)
    return str(path)


CYCLE = torch.randperm(40, generator=torch.Generator().manual_seed(0)) + 2
TEXT = CYCLE.repeat(60)  # each token tells the next one


@functools.cache
def taught(name: str) -> torch.nn.Module:
    """A tiny model that knows a text by heart."""
    model, generator = tiny.build(name, sharpen=1.0), torch.Generator().manual_seed(0)

    def loss() -> torch.Tensor:
        ids = torch.stack([TEXT[at : at + 24] for at in torch.randint(0, 2000, (8,), generator=generator).tolist()])
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    descend(model.parameters(), loss, 60, 0.01, model.device)
    return model.eval()


def known(rows: int = 2) -> dict[str, torch.Tensor]:
    """Prompts from that text."""
    ids = torch.stack([TEXT[5 + 7 * row : 35 + 7 * row] for row in range(rows)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
