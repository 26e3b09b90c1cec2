"""What becomes of the entries that are not kept. Evicting is ``KVLayer.keep``, skipping is ``kernels.selected_attention``;
here is the entry that stands in for the dropped ones."""

from __future__ import annotations

import torch


def others(slots: torch.Tensor, n: int) -> torch.Tensor:
    """Boolean ``(batch, heads, n)``: the slots that were not chosen."""
    left = torch.ones(*slots.shape[:2], n + 1, dtype=torch.bool, device=slots.device)
    left.scatter_(-1, slots.masked_fill(slots < 0, n), False)
    return left[..., :n]


def compensate(
    keys: torch.Tensor, values: torch.Tensor, dropped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One entry that stands for all dropped ones (RazorAttention, 2024).

    Args:
        keys, values: ``(batch, kv_heads, n, head_dim)``.
        dropped: boolean ``(batch, kv_heads, n)``.

    Returns:
        mean key and mean value ``(batch, kv_heads, 1, head_dim)`` and ``log N`` ``(batch, kv_heads, 1)``, which is added to
        the mean key's logit: a mean key that stands for N equal keys gives exactly their attention. log 0 = -inf.
    """
    weight = dropped.float()[..., None]
    count = weight.sum(2, keepdim=True)
    mean_key = (keys.float() * weight).sum(2, keepdim=True) / count.clamp(min=1)
    mean_value = (values.float() * weight).sum(2, keepdim=True) / count.clamp(min=1)
    return mean_key.to(keys.dtype), mean_value.to(values.dtype), count[..., 0].log()
