"""The Bigram-Backcopy task and a small transformer that learns it, on which sinks and drained values can be watched growing.

Source: Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs (2024). Characters
follow a bigram table, but after one of a few *trigger* characters comes the character before it. One head is enough: it
copies after triggers and has nothing to do elsewhere, where softmax must still put its weight somewhere. With
ReLU attention, which may sum to less than one, the sink does not arise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention

from laconic.errors import LaconicError

BOS = 0  # token of the beginning; characters are 1, 2, ...
ATTENTIONS = ("softmax", "relu")


class BigramBackcopy:
    """Draws sequences of the task.

    Args:
        text: what the bigram table and the trigger characters (the most frequent ones) are counted in.
        triggers: how many.
        seed: of the draws.

    Attributes:
        vocabulary: characters and BOS.
        triggers: bool ``(vocabulary,)``.
        bigram: float64 ``(vocabulary, vocabulary)``: probability of the next character; row BOS leaves triggers out.
    """

    def __init__(self, text: str, *, triggers: int = 3, seed: int = 0) -> None:
        characters = sorted(set(text))
        if len(characters) <= triggers:
            raise LaconicError(f"A text of {len(characters)} different characters is too plain for {triggers} triggers.")
        index = {character: i + 1 for i, character in enumerate(characters)}
        ids = torch.tensor([index[character] for character in text])
        self.vocabulary = len(characters) + 1
        counts = torch.bincount(ids, minlength=self.vocabulary).double()
        self.triggers = torch.zeros(self.vocabulary, dtype=torch.bool)
        self.triggers[counts.topk(triggers).indices] = True
        pairs = torch.bincount(ids[:-1] * self.vocabulary + ids[1:], minlength=self.vocabulary**2).double()
        pairs = pairs.view(self.vocabulary, self.vocabulary)
        pairs[BOS] = counts.masked_fill(self.triggers, 0.0)
        last = pairs.sum(1) == 0  # a character that ends the text and stands nowhere else goes on like a beginning
        pairs[last] = pairs[BOS].clone()
        self.bigram = pairs / pairs.sum(1, keepdim=True)
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """int64 ``(rows, length)``: BOS, then characters."""
        ids = torch.full((rows, length), BOS)
        for i in range(1, length):
            drawn = torch.multinomial(self.bigram[ids[:, i - 1]], 1, generator=self._generator)[:, 0]
            ids[:, i] = torch.where(self.triggers[ids[:, i - 1]], ids[:, i - 2], drawn) if i > 1 else drawn
        return ids

    def oracle(self, ids: torch.Tensor) -> float:
        """The least mean loss that is possible at the positions that are not after a trigger (after one it is 0)."""
        before, after = ids[:, :-1], ids[:, 1:]
        return float(-self.bigram[before, after][~self.triggers[before]].log().mean())


class ToyTransformer(nn.Module):
    """Pre-norm decoder with one head per layer, learned positions and no biases in its linear maps.

    Embeddings are drawn from N(0, 1): with small ones the sink stays weak for long.
    """

    def __init__(
        self, vocabulary: int, length: int, *, dim: int = 64, layers: int = 1, attention: str = "softmax", seed: int = 0
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise LaconicError(f"attention is '{attention}': use {' or '.join(ATTENTIONS)}.")
        torch.manual_seed(seed)
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(_Block(dim, attention) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, length, vocabulary)``."""
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class _Block(nn.Module):
    def __init__(self, dim: int, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.ReLU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norms[0](hidden)
        query, key, value = self.query(normed), self.key(normed), self.value(normed)
        if self.attention == "softmax":
            mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mixed = relu_attention(query, key, value)
        hidden = hidden + self.out(mixed)
        return hidden + self.mlp(self.norms[1](hidden))


def relu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention with relu(q.k / sqrt(d)) / (tokens seen) for weights, which may sum to anything >= 0.

    ``(..., n, d)`` each; for the short sequences of the toy, for it holds n x n weights.
    """
    return relu_weights(query, key) @ value


def relu_weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The weights of ``relu_attention``, ``(..., n, n)``."""
    n = query.shape[-2]
    seen = torch.arange(1, n + 1, device=query.device)[:, None]
    return (relu(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])) / seen).tril()


@dataclass(frozen=True)
class Trained:
    """A trained toy and what it shows on fresh sequences.

    Attributes:
        copy_loss, bigram_loss: mean loss after triggers, and elsewhere beyond what is possible.
        sink, copy_sink: mean weight on BOS in layer 0, of queries that are not triggers and of triggers.
        value_ratio: length of BOS's value over the median, in layer 0.
    """

    model: ToyTransformer
    task: BigramBackcopy
    copy_loss: float
    bigram_loss: float
    sink: float
    copy_sink: float
    value_ratio: float


def train(
    text: str, *, attention: str = "softmax", steps: int = 500, length: int = 128, rows: int = 64, layers: int = 1, seed: int = 0
) -> Trained:
    """Trains the toy with AdamW (lr 3e-3), some 70 ms a step on a core, and measures it."""
    task = BigramBackcopy(text, seed=seed)
    model = ToyTransformer(task.vocabulary, length, attention=attention, layers=layers, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    for _ in range(steps):
        ids = task.batch(rows, length)
        loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return measure(model.eval(), task, rows)


@torch.no_grad()
def measure(model: ToyTransformer, task: BigramBackcopy, rows: int = 64) -> Trained:
    """Losses and sinks on fresh sequences."""
    ids = task.batch(rows, model.positions.num_embeddings)
    before, after = ids[:, :-1], ids[:, 1:]
    losses = cross_entropy(model(before).transpose(1, 2), after, reduction="none")
    copies = task.triggers[before]
    copies[:, :1] = False
    weights, values = first_layer(model, before)
    on_bos = weights[..., BOS]
    later = torch.arange(before.shape[1]) > 0
    lengths = values.norm(dim=-1)
    return Trained(
        model=model,
        task=task,
        copy_loss=float(losses[copies].mean()),
        bigram_loss=float(losses[~task.triggers[before]].mean()) - task.oracle(ids),
        sink=float(on_bos[~copies & later].mean()),
        copy_sink=float(on_bos[copies].mean()),
        value_ratio=float((lengths[:, 0] / lengths[:, 1:].median(1).values).mean()),
    )


@torch.no_grad()
def first_layer(model: ToyTransformer, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights ``(batch, n, n)`` and values ``(batch, n, dim)`` of layer 0."""
    block = model.blocks[0]
    normed = block.norms[0](model.tokens(ids) + model.positions(torch.arange(ids.shape[1])))
    query, key = block.query(normed), block.key(normed)
    if block.attention == "relu":
        weights = relu_weights(query, key)
    else:
        logits = query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
        weights = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return weights, block.value(normed)


@torch.no_grad()
def loss_with_sink_forced(trained: Trained, on_triggers: bool, rows: int = 64) -> tuple[float, float]:
    """Mean loss as it is, and with all weight of layer 0 forced onto BOS, at the queries that are (or are not) triggers.

    Where the head is dormant nothing changes; where it is active the copy is destroyed.
    """
    model, task = trained.model, trained.task
    ids = task.batch(rows, model.positions.num_embeddings)
    before, after = ids[:, :-1], ids[:, 1:]
    chosen = task.triggers[before] if on_triggers else ~task.triggers[before]
    weights, values = first_layer(model, before)
    forced = torch.where(chosen[..., None], values[:, :1], weights @ values)
    losses = []
    for mixed in (weights @ values, forced):
        block = model.blocks[0]
        hidden = model.tokens(before) + model.positions(torch.arange(before.shape[1])) + block.out(mixed)
        hidden = hidden + block.mlp(block.norms[1](hidden))
        for deeper in model.blocks[1:]:
            hidden = deeper(hidden)
        logits = model.head(model.norm(hidden))
        losses.append(float(cross_entropy(logits.transpose(1, 2), after, reduction="none")[chosen].mean()))
    return losses[0], losses[1]
