"""One decode step of attention, stock and ours: the new token enters the cache and attends to all that is held."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from laconic.attention.engine import Policy, attention_forward
from laconic.cache import KVCache, KVLayer
from laconic.recipe import Recipe


@dataclass(frozen=True)
class Shape:
    """A layer in decoding, batch 1; ``tokens`` are in the cache before the first step."""

    tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.kv_heads * self.tokens * self.head_dim * self.dtype.itemsize

    def describe(self) -> dict[str, int | str]:
        return {
            "tokens": self.tokens, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."), "cache_bytes": self.cache_bytes,
        }  # fmt: skip

    def filled(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random keys and values ``(1, kv_heads, tokens, head_dim)``."""
        size = (1, self.kv_heads, self.tokens, self.head_dim)
        keys, values = (torch.empty(size, dtype=self.dtype) for _ in range(2))
        for part in (*keys[0], *values[0]):
            part.copy_(torch.randn(part.shape, generator=generator))
        return keys, values

    def incoming(self, count: int, generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Random query, key and value of ``count`` steps: ``(1, heads or kv_heads, 1, head_dim)``."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        sizes = [(1, h, 1, self.head_dim) for h in heads]
        return [tuple(torch.randn(size, generator=generator).to(self.dtype) for size in sizes) for _ in range(count)]

    @property
    def module(self) -> SimpleNamespace:
        """What the attention functions of transformers ask of their module."""
        return SimpleNamespace(num_key_value_groups=self.heads // self.kv_heads, is_causal=True, training=False)


class StockStep:
    """transformers' ``DynamicCache.update`` and its sdpa attention function."""

    def __init__(self, shape: Shape, keys: torch.Tensor, values: torch.Tensor, incoming: list) -> None:
        from transformers.cache_utils import DynamicCache
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self.shape, self.incoming, self._attention = shape, incoming, sdpa_attention_forward
        self.cache = DynamicCache()
        self.cache.update(keys, values, 0)

    def __call__(self, i: int) -> torch.Tensor:
        """Output ``(1, 1, heads, head_dim)`` of step ``i``."""
        query, key, value = self.incoming[i]
        keys, values = self.cache.update(key, value, 0)
        return self._attention(self.shape.module, query, keys, values, None, scaling=self.shape.scale)[0]


class OurStep:
    """What ``laconic.apply(model, recipe)`` puts in their place: our cache and our attention function.

    With ``layers`` above 1 a step goes through that many layers, for methods that hand a choice from layer to layer. All
    layers lie in the same memory, which is far larger than what a processor keeps near: each is read from memory anew.
    """

    def __init__(
        self, shape: Shape, keys: torch.Tensor, values: torch.Tensor, incoming: list, recipe: str, layers: int = 1
    ) -> None:
        self.shape, self.incoming = shape, incoming
        self.cache = KVCache(layers)
        self.cache.request.policy = Policy(Recipe.parse(recipe).methods)
        self.cache.update(keys, values, 0)
        for layer in self.cache.layers[1:]:
            layer.update(keys[:, :, :1], values[:, :, :1])
            for name in ("_keys", "_values", "_positions"):
                own, first = getattr(layer, name), getattr(self.cache.layers[0], name)
                own._data, own._begin, own.n, own._view = first._data, first._begin, first.n, None
            layer.seen = self.cache.layers[0].seen

    def __call__(self, i: int) -> torch.Tensor:
        """Output ``(1, 1, heads, head_dim)`` of step ``i`` in the last layer."""
        query, key, value = self.incoming[i]
        for layer in range(len(self.cache.layers)):
            keys, values = self.cache.update(key, value, layer)
            output = attention_forward(self.shape.module, query, keys, values, None, scaling=self.shape.scale)[0]
        return output

    @property
    def layer(self) -> KVLayer:
        return self.cache.layers[0]

    @property
    def bytes_read(self) -> float:
        """Of the last step, per layer."""
        figures = self.cache.request.figures.values()
        return sum(figure["bytes_read"] for figure in figures) / len(figures)
