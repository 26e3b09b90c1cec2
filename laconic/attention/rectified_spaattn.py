"""Rectified SpaAttn: block-sparse attention for diffusion transformers that gives the dropped blocks their weight back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from laconic.method import Method, parameter
from laconic.registry import register

RECTIFY = ("gated", "all", "scale", "none")


@register
@dataclass(frozen=True, kw_only=True)
class RectifiedSpaAttn(Method):
    """Attends to the key blocks that matter to a block of queries, and adds a pooled estimate of the others where that helps.

    For self-attention without a causal mask over image or video tokens, with text tokens at the end. Queries and keys are
    averaged over blocks; the softmax of the averages says which key blocks are critical to a block of queries: the budget's
    share (or number) of them, or as many as hold ``coverage`` of the weight. Text keys are always read, one by one. What was
    read is scaled down to its share of the weight, and a dropped block whose averages stand for its tokens well (gain above
    error) adds its mean value with its share; the share of one that does not goes to what was read. Exact when a block is
    one token.

    ``attend(query, key, value)`` works on tensors ``(batch, heads, n, head_dim)``; ``inside()`` puts it into every model that
    runs in the block. Training-free; nothing is kept between calls.
    """

    id: ClassVar[str] = "rectified_spaattn"
    stage: ClassVar[str] = "diffusion"
    paper: ClassVar[str] = "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation (2025)"

    block: int = parameter(128, "tokens per block of queries and of keys", least=1)
    coverage: float = parameter(0.3, "share of the pooled weight that the blocks read must hold, whatever the budget", least=0)
    rectify: str = parameter("gated", "gated: add dropped blocks that pass the gain test; all; scale: only scale; none")
    least: int = parameter(1024, "shorter sequences are left dense", least=1)

    def check(self) -> None:
        self.require(self.rectify in RECTIFY, f"rectify must be one of {', '.join(RECTIFY)}.")
        self.require(self.coverage <= 1, "coverage is a share: give a number up to 1.")

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, text: int = 0, near: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Output ``(batch, heads, n, head_dim)``, and the share of key blocks read (``read``) and added (``added``).

        Args:
            query, key, value: ``(batch, heads, n, head_dim)``; the last ``text`` tokens are text.
            near: bool ``(blocks, blocks)``: key blocks (columns) that a query block (row) always reads, such as neighbours.
        """
        n = query.shape[2] - text
        pooled = _Pooled.of(query[:, :, :n], key[:, :, :n], self.block)
        share, text_share = pooled.shares(key[:, :, n:])
        critical = self._critical(share, text_share)
        if near is not None:
            critical = critical | near
        rest = ~critical
        worth = torch.zeros_like(rest) if self.rectify in ("scale", "none") else rest
        if self.rectify == "gated":
            worth = rest & pooled.gains()
        read = self._read(query[:, :, :n], key, value, critical, text)
        if self.rectify != "none":
            means = _means(value[:, :, :n], self.block)
            own = 1 - (share * worth).sum(-1) if self.rectify != "scale" else 1 - (share * rest).sum(-1)
            spread = [torch.repeat_interleave(t, self.block, 2)[:, :, :n] for t in (own[..., None], (share * worth) @ means)]
            read = (spread[0] * read.float() + spread[1]).to(query.dtype)
        figures = {"read": float(critical.float().mean()), "added": float(worth.float().mean())}
        if not text:
            return read, figures
        return torch.cat([read, scaled_dot_product_attention(query[:, :, n:], key, value)], dim=2), figures

    def _critical(self, share: torch.Tensor, text_share: torch.Tensor) -> torch.Tensor:
        """Bool ``(batch, heads, query blocks, key blocks)``; the text counts as one block that is always read."""
        blocks = share.shape[-1]
        least = max(1, self.budget.tokens(blocks))
        order = torch.cat([share, text_share[..., None]], -1).sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        taken = (before <= self.coverage) | (torch.arange(blocks + 1, device=share.device) < least)
        return torch.zeros_like(taken).scatter(-1, order.indices, taken)[..., :blocks]

    def _read(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, critical: torch.Tensor, text: int
    ) -> torch.Tensor:
        """Exact attention of every query block over its critical key blocks and the text; only these are computed."""
        (batch, heads, n, _), total, size = query.shape, key.shape[2], self.block
        output = torch.empty(*query.shape[:3], value.shape[-1], dtype=query.dtype, device=query.device)
        tail = torch.arange(n, total, device=query.device)
        inside = torch.arange(size, device=query.device)
        for b in range(batch):
            for h in range(heads):
                for i in range(critical.shape[2]):
                    chosen = critical[b, h, i].nonzero()[:, 0]
                    slots = (chosen[:, None] * size + inside).flatten()
                    slots = torch.cat([slots[slots < n], tail])
                    rows = slice(i * size, min((i + 1) * size, n))
                    output[b, h, rows] = scaled_dot_product_attention(
                        query[b, h, None, rows], key[b, h, None, slots], value[b, h, None, slots]
                    )[0]
        return output

    @contextmanager
    def inside(self, text: int = 0) -> Iterator[list[dict[str, float]]]:
        """In the block, self-attention without a mask over at least ``least`` tokens runs through ``attend``.

        Whatever calls ``torch.nn.functional.scaled_dot_product_attention``, as the models of diffusers do, is reached; causal,
        masked and cross-attention and short sequences stay as they are. Yields a list that gets the figures of each call.
        """
        with _Mode(self, text) as mode:
            yield mode.figures


@dataclass(frozen=True)
class _Pooled:
    """Means of blocks of queries and keys, float32 ``(batch, heads, blocks, head_dim)``, and how far their tokens stray."""

    query: torch.Tensor
    key: torch.Tensor
    query_stray: torch.Tensor
    key_stray: torch.Tensor
    sizes: torch.Tensor

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, block: int) -> _Pooled:
        means, strays = [], []
        for tensor in (query, key):
            mean = _means(tensor, block)
            away = (tensor.float() - mean.repeat_interleave(block, 2)[:, :, : tensor.shape[2]]).abs()
            means.append(mean)
            strays.append(_means(away, block))
        n, blocks = key.shape[2], means[1].shape[2]
        sizes = (n - torch.arange(blocks, device=key.device) * block).clamp(max=block)
        return cls(*means, *strays, sizes)

    def shares(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the weight of each key block, ``(..., query blocks, key blocks)``, and of all text, ``(..., query blocks)``.

        A block of N tokens counts N times: log N is added to its logit. Text tokens count one by one.
        """
        scale = self.query.shape[-1] ** -0.5
        logits = self.query @ self.key.transpose(-1, -2) * scale + self.sizes.log()
        words = self.query @ text.float().transpose(-1, -2) * scale
        weights = torch.cat([logits, words], -1).softmax(-1)
        blocks = logits.shape[-1]
        return weights[..., :blocks], weights[..., blocks:].sum(-1)

    def gains(self) -> torch.Tensor:
        """Whether the pooled logit is larger than what pooling may have changed in it, per pair of blocks."""
        logits = (self.query @ self.key.transpose(-1, -2)).abs()
        error = (self.query_stray @ self.key.transpose(-1, -2)).abs() + (self.query @ self.key_stray.transpose(-1, -2)).abs()
        return logits > error


def _means(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """Means over blocks of tokens, float32 ``(batch, heads, blocks, head_dim)``; the last block may be shorter."""
    n = tensor.shape[2]
    whole = n // block * block
    parts = tensor[:, :, :whole].float().unflatten(2, (-1, block)).mean(3)
    return parts if whole == n else torch.cat([parts, tensor[:, :, whole:].float().mean(2, keepdim=True)], 2)


class _Mode(TorchFunctionMode):
    """Stands in for scaled_dot_product_attention while models run."""

    def __init__(self, method: RectifiedSpaAttn, text: int) -> None:
        super().__init__()
        self.method, self.text = method, text
        self.figures: list[dict[str, float]] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention or not self._fits(*args, **kwargs):
            return function(*args, **kwargs)
        query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
        scale = kwargs.get("scale")
        if scale is not None:
            query = query * (scale * math.sqrt(query.shape[-1]))
        output, figures = self.method.attend(query, key, value, text=self.text)
        self.figures.append(figures)
        return output

    def _fits(
        self, query: Any, key: Any, value: Any = None, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        **options: Any,
    ) -> bool:  # fmt: skip
        square = query.dim() == 4 and query.shape[:3] == key.shape[:3]
        return square and attn_mask is None and not is_causal and not dropout_p and query.shape[2] >= self.method.least
