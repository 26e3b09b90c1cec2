"""A small convolution that tells from the first layer's attention which tokens of a picture an answer will rest on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from laconic.errors import LaconicError
from laconic.profiles import weights_from_json

CHANNELS = (32, 64, 128, 256, 512)
KERNEL = 5  # tokens in a row that a convolution looks at; the source does not say
BATCH, EPOCHS, RATE = 128, 100, 1e-3  # of training with Adam
ZEROED = 0.5  # share of the least relevant tokens that count as not relevant at all


class RelevanceStudent(nn.Module):
    """Five depthwise-separable 1-D convolutions along the tokens of a picture, row by row, and a last one to a single channel.

    The input is attention over its mean, so that it looks alike for any number of tokens. Ends of rows are neighbours to it.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *CHANNELS), CHANNELS, strict=False):
            deep = nn.Conv1d(before, before, KERNEL, padding=KERNEL // 2, groups=before)
            layers += [deep, nn.Conv1d(before, after, 1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv1d(CHANNELS[-1], 1, 1))

    def forward(self, attention: torch.Tensor) -> torch.Tensor:
        """``(batch, n)`` of any n to log-probabilities ``(batch, n)``."""
        scaled = attention / attention.mean(-1, keepdim=True).clamp(min=1e-12)
        return log_softmax(self.layers(scaled[:, None])[:, 0], dim=-1)

    @classmethod
    def of(cls, tables: dict[str, Any]) -> RelevanceStudent:
        """One with the weights that ``weights_to_json`` gave."""
        student = cls()
        student.load_state_dict(weights_from_json(tables))
        return student.eval().requires_grad_(False)


def label_of(relevance: torch.Tensor) -> torch.Tensor:
    """Relevance ``(n,)`` as probabilities: the lower half is 0, the rest divided by its sum."""
    label = relevance.float().clone()
    label[relevance.argsort(stable=True)[: int(ZEROED * len(relevance))]] = 0.0
    if not bool(label.any()):
        raise LaconicError("There is no relevance to learn from: nothing in this picture mattered for the answer.")
    return label / label.sum()


def divergence(label: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """KL(label || predicted) in nats, ``(batch,)``, of probabilities and log-probabilities ``(batch, n)``; 0 iff equal."""
    return (torch.xlogy(label, label) - label * predicted).sum(-1)


def train_student(examples: list[tuple[torch.Tensor, torch.Tensor]], seed: int) -> RelevanceStudent:
    """Learns from pairs of attention ``(n,)`` and label ``(n,)``, pictures of any sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = RelevanceStudent().to(examples[0][0].device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(examples), generator=generator).split(BATCH):
                optimizer.zero_grad()
                mean_divergence(student, [examples[i] for i in batch.tolist()]).backward()
                optimizer.step()
    return student.eval().requires_grad_(False)


def mean_divergence(student: RelevanceStudent, examples: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The mean loss over ``examples``; those of one size are computed together."""
    sizes: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for attention, label in examples:
        sizes.setdefault(len(label), []).append((attention, label))
    stacked = (map(torch.stack, zip(*group, strict=True)) for group in sizes.values())
    return sum(divergence(label, student(attention)).sum() for attention, label in stacked) / len(examples)
