"""Moving keys to other positions: rotary embeddings applied by difference."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True)
class Rope:
    """A rotary embedding (RoFormer, 2021): frequencies ``(rotated_dims / 2,)`` in radians per token and their layout.

    ``half`` pairs dimension i with i + rotated_dims / 2, ``interleaved`` pairs 2i with 2i + 1. Dimensions past
    ``rotated_dims`` (partial rotary) are left as they are.
    """

    frequencies: torch.Tensor
    layout: str = "half"

    def rotate(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Turns ``x`` (..., n, head_dim) by ``offset`` positions (..., n), broadcast; negative offsets undo."""
        angle = offset[..., None].to(torch.float32) * self.frequencies.to(x.device, torch.float32)
        return self._turn(x, angle.cos(), angle.sin())

    def rotate_mean(self, x: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
        """The mean of ``x`` (batch, ..., head_dim) turned by each of the ``count`` positions from ``first`` (batch,) on."""
        ahead = first[:, None] + torch.arange(count, device=x.device)
        angle = ahead[..., None].to(torch.float32) * self.frequencies.to(x.device, torch.float32)
        shape = (len(first), *[1] * (x.dim() - 2), -1)
        return self._turn(x, angle.cos().mean(1).view(shape), angle.sin().mean(1).view(shape))

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        width = 2 * self.frequencies.shape[0]
        turned, rest = x[..., :width].float(), x[..., width:]
        if self.layout == "half":
            a, b = turned.chunk(2, dim=-1)
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([out.to(x.dtype), rest], dim=-1) if rest.shape[-1] else out.to(x.dtype)


def find_rope(model: torch.nn.Module) -> Rope | None:
    """The model's rotary embedding, or None when it has none or one that we cannot tell by test.

    The layout is not guessed from the model's name: the model's own ``apply_rotary_pos_emb`` turns a random key, and a
    layout is taken only if it gives the same numbers. Several frequency tables in one model (one per kind of layer) are
    answered with None.
    """
    tables = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    if len(tables) != 1:
        return None
    inv_freq = tables[0].inv_freq.detach()
    apply = getattr(sys.modules.get(type(model).__module__), "apply_rotary_pos_emb", None)
    if apply is None or inv_freq.dim() != 1:
        return None
    position = torch.tensor([[7]], device=inv_freq.device)
    key = torch.randn(1, 1, 1, 2 * inv_freq.shape[0], generator=torch.Generator().manual_seed(0)).to(inv_freq.device)
    try:
        cos, sin = tables[0](key[:, 0], position)
        _, expected = apply(key, key, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return None
    scale = getattr(tables[0], "attention_scaling", 1.0)
    for layout in LAYOUTS:
        rope = Rope(inv_freq, layout)
        if torch.allclose(rope.rotate(key, position) * scale, expected, atol=1e-4):
            return rope
    return None
