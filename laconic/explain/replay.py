"""One forward of a prompt, of which the layers from any one on can be run again on a part of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from laconic.cache import KVCache
from laconic.errors import LaconicError
from laconic.hooks import Handle, apply
from laconic.layers import change_tensors, decoder_layers, take_rows
from laconic.models.pictures import find_eyes

TOKENS = 8192  # rows that go through a layer at a time


class Replay:
    """A prompt with its answer inside a dense model: what every layer was given, and the answer's chances.

    Tokens that are left out from a layer on are in no key of it or of deeper layers; all others keep their positions. What lies
    before that layer is not computed again.

    Attributes:
        layers: how many there are.
        pictured: bool ``(n,)``: which tokens stand for pictures, marks at the ends of rows among them.
    """

    def __init__(self, handle: Handle, inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> None:
        self._handle, self._layers = handle, decoder_layers(handle.model)
        self._head, eyes = handle.model.get_output_embeddings(), find_eyes(handle.model)
        self._norm = getattr(eyes.language, "norm", None)
        self._answer = answer.to(self._head.weight.device)
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._made: list[torch.Tensor] = []
        self.layers = len(self._layers)
        inputs = {name: value.to(self._answer.device) for name, value in inputs.items()}
        given = with_answer(inputs, self._answer, handle.model.config.model_type)
        self.pictured = given["input_ids"][0] == eyes.image
        with self._watched(), torch.no_grad():
            logits = handle.model(**given, use_cache=True, logits_to_keep=len(answer)).logits.float()
        self._check_head(logits)
        self._added = [None, *map(self._between, range(1, self.layers))]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Notes what the layers are given and what they make of it."""

        def before(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            self._calls.append((args or (rest.pop("hidden_states"),), rest))

        def after(layer: torch.nn.Module, args: tuple, output: Any) -> None:
            self._made.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        hooks += [layer.register_forward_hook(after) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check_head(self, logits: torch.Tensor) -> None:
        """Refuses a model that makes something else of its last layer's output than we would."""
        if self._norm is None or float((logits - self._logits(self._made[-1])).abs().max()) > 0.05 * float(logits.abs().max()):
            name = type(self._handle.model).__name__
            raise LaconicError(f"What {name} makes of its last layer's output is not understood: use another model.")

    def _between(self, index: int) -> torch.Tensor | None:
        """What the model adds to the hidden states before a layer (Qwen3-VL: features of pictures), float32, or None."""
        given, made = self._calls[index][0][0], self._made[index - 1]
        return None if torch.equal(given, made) else given.float() - made.float()

    def chances(self, first: int, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer's chances where from layer ``first`` on only some tokens are there; with as many layers as there are, all.

        Args:
            kept: bool ``(variants, n)``; the tokens that the answer is read from must be among them.

        Returns:
            log-probability of the answer per token, float32 ``(variants,)``, and whether it is the greedy one, bool.
        """
        if first == self.layers:
            found = self._chances(self._logits(self._made[-1]))
            return tuple(part.expand(len(kept)) for part in found)
        parts = kept.split(max(1, TOKENS // int(kept.sum(-1).max())))
        found = [self._chances(self._logits(self._run(first, rows_of(part)))) for part in parts]
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    @torch.no_grad()
    def _run(self, first: int, rows: torch.Tensor) -> torch.Tensor:
        """Output ``(variants, k, dim)`` of the last layer on ``rows`` (variants, k), -1 in front."""
        cache = self._handle.cache()
        cache.request.positions = rows
        count, hidden = len(self.pictured), None

        def part(value: torch.Tensor) -> torch.Tensor:
            return take_rows(value, rows, len(rows), count)

        for index in range(first, self.layers):
            args, kwargs = self._calls[index]
            if hidden is None:
                hidden = part(args[0])
            elif self._added[index] is not None:
                hidden = (hidden.float() + part(self._added[index])).to(hidden.dtype)
            rest = {name: cache if isinstance(value, KVCache) else change_tensors(value, part) for name, value in kwargs.items()}
            output = self._layers[index](hidden, *change_tensors(args[1:], part), **rest)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``(variants, answer, vocabulary)`` from which the answer is read."""
        return self._head(self._norm(hidden[:, -len(self._answer) :])).float()

    def _chances(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = self._answer.expand(len(logits), -1)
        log_probs = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0].mean(-1)
        return log_probs.cpu(), (logits.argmax(-1) == wanted).all(-1).cpu()


def rows_of(kept: torch.Tensor) -> torch.Tensor:
    """The numbers of the True ones of each row of ``kept`` (variants, n), ascending, -1 in front of shorter ones."""
    count = int(kept.sum(-1).max())
    order = kept.to(torch.int8).argsort(dim=-1, stable=True)[:, -count:]
    return order.masked_fill(~kept.gather(1, order), -1)


def with_answer(inputs: dict[str, torch.Tensor], answer: torch.Tensor, family: str) -> dict[str, torch.Tensor]:
    """The inputs of one prompt with all of the ``answer`` (a,) behind it but its last token, which nothing is read from."""
    count, more = inputs["input_ids"].shape[1], answer[None, :-1]
    added = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    if family == "paligemma":  # whose prompts see all of themselves: this says that it is no part of the prompt
        added["token_type_ids"] = torch.ones_like(more)
    return {
        name: torch.cat([value, added.get(name, torch.zeros_like(more)).to(value.dtype)], 1)
        if value.shape == (1, count)
        else value
        for name, value in inputs.items()
    }


@contextmanager
def replay(model: torch.nn.Module, inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> Iterator[Replay]:
    """Inside the block, the layers of ``model`` can be run again on a prompt (batch 1) and its ``answer``, token ids ``(a,)``."""
    with apply(model, "dense") as handle:
        yield Replay(handle, inputs, answer)
