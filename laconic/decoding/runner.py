"""A model with its cache, fed texts and draft trees: one forward each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from laconic.attention.branches import Branches
from laconic.decoding.tree import PromptRows, TreeShape
from laconic.errors import LaconicError
from laconic.hooks import Handle, cache_name


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str, pad: int = 0) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (batch, n) of texts of different lengths."""
    ids = [torch.tensor(row, dtype=torch.int64, device=device) for row in rows]
    options = {"batch_first": True, "padding_side": "left"}
    mask = pad_sequence([torch.ones_like(row) for row in ids], **options)
    return {"input_ids": pad_sequence(ids, padding_value=pad, **options), "attention_mask": mask}


class Runner:
    """Runs a batch of texts in a model that a recipe is applied to.

    Attributes:
        limit: positions that the model knows, or None.
        lengths: int64 ``(batch,)``: tokens of each text that the cache holds for good.
        forwards: how many there were; rows: tokens that they computed, padding and empty nodes included.
        pending: nodes in the cache that ``settle`` has not judged yet.
    """

    def __init__(self, handle: Handle, *, hidden: bool = False) -> None:
        self.handle, self.model, self.hidden = handle, handle.model, hidden
        self.device = self.model.device  # asked once: a model looks through its parameters for it
        self.limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.cache, self._cache_name = handle.cache(), cache_name(handle.model)
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self.shift: torch.Tensor | None = None  # between the places of tokens in the text and their positions, with pictures
        self.forwards = self.rows = 0
        self._forget_draft()

    def _forget_draft(self) -> None:
        self.pending = 0
        self._sees: torch.Tensor | None = None
        self._depths: torch.Tensor | None = None

    def prefill(self, inputs: dict[str, Any]) -> Any:
        """The model's output for prompts, with the logits ``(batch, 1, vocabulary)`` of their last tokens.

        Args:
            inputs: ``input_ids`` and ``attention_mask`` (batch, n), padded on the left, and pictures where the model takes them.
        """
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        self.lengths = torch.full(ids.shape[:1], ids.shape[1]) if mask is None else mask.sum(-1).cpu()
        if mask is not None and "position_ids" not in inputs and set(inputs) == {"input_ids", "attention_mask"}:
            inputs = {**inputs, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
        output = self._forward({**inputs, "logits_to_keep": 1})
        deltas = getattr(getattr(self.model, "model", None), "rope_deltas", None)  # of models with positions in pictures
        self.shift = None if deltas is None else deltas.reshape(-1, 1).cpu()
        return output

    def step(self, tokens: torch.Tensor) -> Any:
        """The output for one more token of each text, ``(batch,)``, which stays."""
        if self.cache.layers[0].gaps is not None:
            output = self.run(tokens[:, None], TreeShape.chain(0, len(tokens)))
            self.settle(torch.zeros(len(tokens), 1, dtype=torch.int64))
            return output
        output = self._forward({"input_ids": tokens[:, None], **self._places(self.lengths[:, None])})
        self.lengths = self.lengths + 1
        return output

    def run(self, tokens: torch.Tensor, shape: TreeShape, prompts: PromptRows | None = None) -> Any:
        """The output for a draft tree, with the logits ``(batch, nodes, vocabulary)`` after every node.

        Args:
            tokens: int64 ``(batch, nodes)``.
            prompts: rows behind the nodes; then there are logits of nodes and rows.
        """
        if prompts is None:
            return self._grow({"input_ids": tokens}, shape.ancestors, shape.depths)
        own = self.model.get_input_embeddings()(tokens)
        embeddings = torch.cat([own, prompts.embeddings.to(own)], dim=1)
        return self._grow({"inputs_embeds": embeddings}, prompts.shape.ancestors, prompts.shape.depths)

    def grow(self, tokens: torch.Tensor, parents: torch.Tensor) -> Any:
        """As ``run``, for nodes ``(batch, new)`` whose parents are among the pending ones; -1 for empty ones."""
        real, above = parents >= 0, parents.clamp(min=0)
        own = torch.eye(tokens.shape[1], dtype=torch.bool).expand(len(tokens), -1, -1)
        sees = torch.cat([self._sees.gather(1, above[..., None].expand(-1, -1, self.pending)), own], dim=-1)
        depths = torch.where(real, self._depths.gather(1, above) + 1, -1)
        return self._grow({"input_ids": tokens}, sees & real[..., None], depths)

    def _grow(self, rows: dict[str, torch.Tensor], sees: torch.Tensor, depths: torch.Tensor) -> Any:
        old, new = self.pending, depths.shape[1]
        positions = torch.where(depths < 0, -1, self.lengths[:, None] + depths)
        self.cache.request.branches = Branches(positions.to(self.device), sees.to(self.device))
        output = self._forward({**rows, **self._places(positions.clamp(min=0))})
        self._sees = sees if not old else torch.cat([torch.nn.functional.pad(self._sees, (0, new)), sees], dim=1)
        self._depths = depths if not old else torch.cat([self._depths, depths], dim=1)
        self.pending = old + new
        return output

    def settle(self, path: torch.Tensor) -> None:
        """Keeps the pending nodes ``path`` (batch, k), the root first, -1 behind the last, and forgets the others."""
        self.cache.settle(path, self.pending)
        self.lengths = self.lengths + (path >= 0).sum(-1)
        self._forget_draft()

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with ``rows`` (k,) of the batch, some of them perhaps more than once."""
        if not torch.equal(rows, torch.arange(len(self.lengths))):
            self.cache.batch_select_indices(rows.to(self.device))
            self.lengths = self.lengths[rows]
            self.shift = None if self.shift is None else self.shift[rows]

    def branch(self, rows: torch.Tensor) -> Runner:
        """Another runner, with counts of its own, that goes on from copies of ``rows`` (k,) of this one."""
        twin = copy.copy(self)
        twin.cache, twin.forwards, twin.rows = self.cache.fork(), 0, 0
        twin.select(rows)
        return twin

    def _places(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        positions = positions if self.shift is None else (positions + self.shift).expand(3, -1, -1)
        return {"position_ids": positions.to(self.device)}

    def _forward(self, arguments: dict[str, Any]) -> Any:
        self.forwards += 1
        self.rows += arguments.get("input_ids", arguments.get("inputs_embeds")).shape[:2].numel()
        try:
            return self.model(**arguments, **{self._cache_name: self.cache}, use_cache=True, output_hidden_states=self.hidden)
        except TypeError as error:
            raise LaconicError(f"{type(self.model).__name__} cannot be fed tokens at given positions ({error}).") from error
