"""What the language model's first layer looks at, told before any token is dropped."""

from __future__ import annotations

from typing import Any

import torch

from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.cache import KVCache, KVLayer, Request
from laconic.vision.inside import attention_of

ROWS = 64  # words whose attention is held at a time


class FirstLayer:
    """Queries and keys of the first layer for the whole prompt. The language model runs until they are there and no further.

    Args:
        language: the language model; kwargs: what it is about to be given, positions among it.
        request: of the forward. In a later turn of a conversation the turns before are not looked at.
    """

    def __init__(self, language: torch.nn.Module, kwargs: dict[str, Any], request: Request) -> None:
        cache, watcher = KVCache(len(request.layers)), _Watcher()
        cache.request.policy, cache.request.positions = watcher, request.positions
        given = {name: cache if isinstance(value, KVCache) else value for name, value in kwargs.items()}
        with torch.no_grad():
            try:
                language.forward(**given)  # not a call, so that the hooks at its entry are not asked again
            except _Known:
                self._layer, self._call = watcher.found

    def attention(self, row: int, words: torch.Tensor, slots: torch.Tensor) -> torch.Tensor | None:
        """Attention that the tokens at ``slots`` (n,) get from ``words`` (w,), mean over heads and words, float32 ``(n,)``; None
        without words."""
        if not len(words):
            return None
        given = (attention_of(self._layer, self._call, row, part)[0][:, slots].sum(0) for part in words.split(ROWS))
        return sum(given) / len(words)


class _Known(Exception):
    """No error: it ends a forward that has told enough."""


class _Watcher(Policy):
    """Takes what the first call of attention brings, and ends the forward."""

    found: tuple[KVLayer, Call]

    def __init__(self) -> None:
        super().__init__(())

    def attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
        self.found = layer, call
        raise _Known
