"""The canvas of a diffusion language model: ids with masks in them, keys and values at random positions, and a count of the work.

A request is a :class:`Run`. A method asks it for predictions, naming the positions to compute and the ones to attend to, and
commits some of them. Everything else that tells the caching plans apart is which positions they name:

==============  ==============================  ==================================
plan            computed                        attended
==============  ==============================  ==================================
``none``        the canvas                      the canvas
``prefix``      from the block on               the canvas
``dual``        the block                       the canvas
window          the first masks                 decoded positions, the next masks
==============  ==============================  ==================================

``prefix`` and ``dual`` (Fast-dLLM, 2025) compute the whole canvas at the start of a block, the window at that of a phase.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from laconic.decoding.positions import draw, negative_entropy, probability

Index = slice | torch.Tensor


@dataclass(frozen=True)
class Step:
    """What one forward did, for display.

    Attributes:
        positions, tokens: what was committed, per row; positions count from the first new one.
        done: per row, how many new tokens from the left on are final: text that can be shown.
        rows: token rows computed, over the batch.
    """

    positions: list[list[int]]
    tokens: list[list[int]]
    done: list[int]
    rows: int


@dataclass
class Prediction:
    """What a forward says about some positions: ``(rows, n)``, ascending; logits ``(rows, n, vocabulary)``.

    ``tokens`` may be changed by a method before it commits them. ``open`` are those still masked.
    """

    positions: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    open: torch.Tensor

    @property
    def probability(self) -> torch.Tensor:
        return probability(self.logits, self.tokens)

    @property
    def certainty(self) -> torch.Tensor:
        """Minus the entropy in nats."""
        return negative_entropy(self.logits)


@dataclass
class Span:
    """Where the next forward writes its keys and values, and which ones it reads."""

    size: int
    write: Index = field(default_factory=lambda: slice(0))
    read: Index = field(default_factory=lambda: slice(0))


class CanvasLayer(CacheLayerMixin):
    """Keys and values of one layer at all positions, ``(rows, kv_heads, size, dim)``, written and read where ``span`` says."""

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.span = span

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.span.size, x.shape[-1]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[:, :, self.span.write] = key_states
        self.values[:, :, self.span.write] = value_states
        return self.keys[:, :, self.span.read], self.values[:, :, self.span.read]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.span.read.stop, 0  # asked for a plain causal forward only, whose reads begin at the first slot

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.span.size


class Run:
    """One request: the canvas, the model with its cache, and what has been done so far.

    Attributes:
        ids: ``(rows, length)`` int64, the prompt and the answer, masks in the latter. open: bool, which are still to decode.
        start: the first position of the answer. length: of the canvas; ``cut`` shortens it.
        forwards, rows: forwards, and token rows that they computed, summed over the batch.
        steps: a record of every forward that committed something.
    """

    def __init__(
        self, model: Any, ids: torch.Tensor, new: int, *, pads: torch.Tensor | None = None, temperature: float = 0.0,
        generator: torch.Generator | None = None, on_step: Callable[[Step, torch.Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        config = model.config.get_text_config()
        self.model, self.mask = model, int(config.mask_token_id)
        self.shift = int(bool(getattr(config, "diffusion_shift", False)))
        self.end = _end_tokens(model).to(ids.device)
        self.start = ids.shape[1]
        self.ids = torch.cat([ids, ids.new_full((len(ids), new), self.mask)], 1)
        self.open = (torch.arange(self.start + new, device=ids.device) >= self.start).repeat(len(ids), 1)
        self.pads, self.temperature, self.generator, self.on_step = pads, temperature, generator, on_step
        self.span = Span(self.start + new)
        self.cache = Cache(layers=[CanvasLayer(self.span) for _ in range(config.num_hidden_layers)])
        self._cache_name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)
        self.forwards = self.rows = self._recorded = 0
        self.steps: list[Step] = []

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def predict(self, compute: torch.Tensor, attend: Index, score: torch.Tensor) -> Prediction:
        """A forward over the positions ``compute`` (ascending) that sees ``attend``; what it says about ``score``.

        All are positions of the canvas; the computed ones are stored, and must be among those attended. Where a model predicts
        the next token (``diffusion_shift``), the position before each scored one is computed as well.
        """
        source = score - self.shift
        if self.shift:
            compute = torch.cat([compute, source]).unique()
        logits = self.forward(
            self.ids[:, compute], compute, write=compute, read=attend, keep=torch.searchsorted(compute, source),
            bias=self._padding(attend),
        )  # fmt: skip
        return self.prediction(score, logits)

    def prediction(self, positions: torch.Tensor, logits: torch.Tensor) -> Prediction:
        """Draws a token for every position; never the mask itself."""
        logits[..., self.mask] = -torch.inf
        tokens = draw(logits, self.temperature, self.generator)
        return Prediction(positions, logits, tokens, self.open[:, positions])

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, *, write: Index, read: Index, bias: torch.Tensor | None,
        keep: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Logits of the rows ``keep`` of a forward over ``ids`` ``(rows, n)`` at ``positions`` ``(n,)``.

        Args:
            write, read: the slots of the cache that take the new keys and values, and that are attended to.
            bias: added to the attention logits, broadcast to ``(rows, 1, n, read)``; what is not seen has the lowest value.
                None: causal attention.
        """
        self.span.write, self.span.read = write, read
        at = positions[None].expand(len(ids), -1)
        if self.pads is not None:
            at = (at - self.pads[:, None]).clamp(min=0)
        self.forwards += 1
        self.rows += ids.numel()
        return self.model(
            input_ids=ids, position_ids=at, use_cache=True, logits_to_keep=keep, **{self._cache_name: self.cache},
            attention_mask=None if bias is None else bias.expand(len(ids), 1, ids.shape[1], -1),
        ).logits  # fmt: skip

    def _padding(self, attend: Index) -> torch.Tensor:
        """Zero for every attended position, the lowest value for padding; its size is that of the keys, not of the map."""
        place = torch.arange(self.length, device=self.ids.device)[attend]
        bias = torch.zeros(1, 1, 1, len(place), dtype=self.model.dtype, device=self.ids.device)
        if self.pads is None:
            return bias
        return bias.masked_fill(place < self.pads[:, None, None, None], torch.finfo(self.model.dtype).min)

    def commit(self, seen: Prediction, taken: torch.Tensor) -> None:
        """Writes the tokens at ``taken`` (rows, n) into the canvas, for good, and records the step."""
        taken = taken & seen.open
        self.ids[:, seen.positions] = torch.where(taken, seen.tokens, self.ids[:, seen.positions])
        self.open[:, seen.positions] &= ~taken
        places = (seen.positions - self.start).expand_as(taken)
        counts = taken.sum(-1).tolist()
        still = self.open[:, self.start :]
        step = Step(
            positions=[part.tolist() for part in places[taken].split(counts)],
            tokens=[part.tolist() for part in seen.tokens[taken].split(counts)],
            done=torch.where(still.any(-1), still.int().argmax(-1), still.shape[-1]).tolist(),
            rows=self.rows - self._recorded,
        )
        self._recorded = self.rows
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step, self.ids[:, self.start :])

    def ended(self) -> torch.Tensor:
        """Which new positions hold an end token, bool ``(rows, new)``."""
        return torch.isin(self.ids[:, self.start :], self.end) & ~self.open[:, self.start :]

    def finish(self) -> bool:
        """Closes what is open in the rows that hold an end token; whether all do."""
        over = self.ended().any(-1)
        self.open &= ~over[:, None]
        return bool(over.all())

    def cut(self, length: int) -> None:
        """Drops all positions from ``length`` on; later forwards do not see them."""
        self.ids, self.open = self.ids[:, :length], self.open[:, :length]


def _end_tokens(model: Any) -> torch.Tensor:
    """Ids of the tokens that end a text; none where the model has no such token."""
    found = getattr(model.generation_config, "eos_token_id", None)
    found = model.config.get_text_config().eos_token_id if found is None else found
    return torch.tensor([] if found is None else found, dtype=torch.long).flatten()
