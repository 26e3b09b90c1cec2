"""The network of FLASH: sees a picture as a few latents, and foretells several hidden states of the target model at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from laconic.attention.rope import Rope
from laconic.errors import LaconicError
from laconic.profiles import weights_from_json

VIEWS = ("latents", "all", "none")


@dataclass(frozen=True)
class FlashForm:
    """Sizes of a network.

    Attributes:
        width: of the target's hidden states; heads, kv_heads, head_dim: of the one attention layer.
        offsets: hidden states foretold at each position.
        latents: tokens that stand for each picture.
        view: latents; all: every token of a picture, as if it were a word; none: pictures are not seen.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    offsets: int = 5
    latents: int = 64
    view: str = "latents"

    @classmethod
    def of_model(cls, model: nn.Module, **changes: Any) -> FlashForm:
        """With the heads of the target model."""
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        return cls(text.hidden_size, heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads, **changes)


class Past(NamedTuple):
    """What the attention layer remembers: keys (turned) and values ``(batch, kv_heads, n, head_dim)``, and which are no padding,
    ``(batch, n)``."""

    keys: torch.Tensor
    values: torch.Tensor
    real: torch.Tensor


class FlashNet(nn.Module):
    """A latent compressor, one causal attention layer with RoPE and a residual, and an MLP to ``offsets`` hidden states.

    An entry is a token's hidden state fused with the embedding of the token after it, or a latent. From the entry of token t the
    network foretells the hidden states of the tokens t + 1, t + 2, ..., from which the target's own head reads the laws of the
    tokens t + 2, t + 3, ...
    """

    def __init__(self, form: FlashForm) -> None:
        super().__init__()
        if form.view not in VIEWS or form.offsets < 1 or (form.view == "latents" and form.latents < 1):
            raise LaconicError(f"A drafter has offsets and latents of 1 and more, and a view of {', '.join(VIEWS)}.")
        self.form, width, size = form, form.width, form.head_dim
        if form.view == "latents":
            self.queries = nn.Parameter(torch.randn(form.latents, width) * width**-0.5)
        self.fuse = nn.Linear(2 * width, width)
        self.query = nn.Linear(width, form.heads * size, bias=False)
        self.key = nn.Linear(width, form.kv_heads * size, bias=False)
        self.value = nn.Linear(width, form.kv_heads * size, bias=False)
        self.out = nn.Linear(form.heads * size, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, form.offsets * width)
        self.rope = Rope(10000.0 ** (-torch.arange(0, size // 2 * 2, 2) / size))

    @classmethod
    def of(cls, tables: dict[str, Any]) -> FlashNet:
        """One from the tables of a profile, frozen."""
        net = cls(FlashForm(**tables["form"]))
        net.load_state_dict(weights_from_json(tables["weights"]))
        return net.eval().requires_grad_(False)

    def compress(self, picture: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(n, width)`` of a picture, of any n, as ``(latents, width)``: weighted means of them, whatever their
        order."""
        return (self.queries @ picture.T).softmax(-1) @ picture

    def entries(self, hidden: torch.Tensor, following: torch.Tensor, pictured: torch.Tensor) -> torch.Tensor:
        """A text's entries ``(m, width)``, where each picture became as many as the view says.

        Args:
            hidden: ``(n, width)``; following: embeddings of the tokens after them; pictured: boolean ``(n,)``.
        """
        fused = self.fuse(torch.cat([following, hidden], dim=-1))
        if self.form.view == "all" or not bool(pictured.any()):
            return fused
        ends = [0, *((pictured[1:] != pictured[:-1]).nonzero()[:, 0] + 1).tolist(), len(pictured)]
        looks, parts = bool(pictured[0]), []
        for begin, end in pairwise(ends):
            if not looks:
                parts.append(fused[begin:end])
            elif self.form.view == "latents":
                parts.append(self.compress(hidden[begin:end]))
            looks = not looks
        return torch.cat(parts)

    def forward(
        self, entries: torch.Tensor, real: torch.Tensor, positions: torch.Tensor, past: Past | None = None
    ) -> tuple[torch.Tensor, Past]:
        """What the layer makes of new entries ``(batch, n, width)``, each of which sees those before it; see ``ahead``.

        Args:
            real: boolean ``(batch, n)``: which entries are no padding; positions: int64 ``(batch, n)``.
        """
        form, (batch, count, _) = self.form, entries.shape

        def heads(linear: nn.Linear, number: int) -> torch.Tensor:
            return linear(entries).view(batch, count, number, form.head_dim).transpose(1, 2)

        at = positions[:, None]
        query = self.rope.rotate(heads(self.query, form.heads), at)
        new = Past(self.rope.rotate(heads(self.key, form.kv_heads), at), heads(self.value, form.kv_heads), real)
        if past is not None:
            new = Past(*(torch.cat([old, add], dim=dim) for old, add, dim in zip(past, new, (2, 2, 1), strict=True)))
        seen = new.real.shape[1] - count
        own = torch.ones(count, count, dtype=torch.bool, device=entries.device).tril()
        sees = torch.nn.functional.pad(own, (seen, 0), value=True) & new.real[:, None]
        itself = torch.nn.functional.pad(torch.eye(count, dtype=torch.bool, device=entries.device), (seen, 0))
        mask = (sees | itself)[:, None]  # padding sees itself, for a row without anything to see would be no number
        read = scaled_dot_product_attention(query, new.keys, new.values, attn_mask=mask, enable_gqa=True)
        return entries + self.out(read.transpose(1, 2).flatten(2)), new

    def ahead(self, states: torch.Tensor) -> torch.Tensor:
        """The hidden states foretold from what ``forward`` gave, ``(..., width)`` to ``(..., offsets, width)``."""
        return self.down(silu(self.up(states))).unflatten(-1, (self.form.offsets, self.form.width))
