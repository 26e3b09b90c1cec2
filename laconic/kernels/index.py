"""Keys in eight bits beside the cache, to vote on at a quarter of the bytes."""

from __future__ import annotations

import torch

from laconic.errors import LaconicError
from laconic.kernels.memory import empty

TILE = 16  # tokens whose dot products are computed at once
QUAD = 4  # neighbouring dimensions that one instruction multiplies and adds
ZERO = 128  # keys are stored as unsigned bytes: round(key / scale) + ZERO


class KeyIndex:
    """8-bit copies of keys ``(batch, kv_heads, n, head_dim)`` with one scale per token and head.

    The bytes lie in tiles of 16 tokens, and in a tile by groups of four dimensions: ``(batch, kv_heads, tiles, head_dim / 4,
    16 * 4)``, which is the order in which dot-product instructions on bytes take them. Appending is amortised O(new).
    """

    def __init__(self, keys: torch.Tensor) -> None:
        batch, heads, _, dim = keys.shape
        if dim % QUAD:
            raise LaconicError(f"8-bit keys need a head size that is a multiple of {QUAD}, not {dim}: leave int8 off.")
        self.n = 0
        self.data = torch.empty(batch, heads, 0, dim // QUAD, TILE * QUAD, dtype=torch.uint8, device=keys.device)
        self.scales = torch.zeros(batch, heads, 0, device=keys.device)
        self.append(keys)

    def append(self, keys: torch.Tensor) -> None:
        """Adds the keys of new tokens, ``(batch, kv_heads, new, head_dim)``."""
        keys = keys.float()
        scales = keys.abs().amax(-1).clamp(min=1e-12) / 127
        codes = ((keys / scales[..., None]).round() + ZERO).to(torch.uint8)
        self._write(codes.unflatten(-1, (-1, QUAD)), scales)

    def crop(self, n: int) -> None:
        """Forgets all but the first ``n`` entries."""
        self.n = min(self.n, n)

    def keep(self, slots: torch.Tensor) -> None:
        """Forgets all but ``slots``, int64 ``(batch, kv_heads or 1, kept)``; what stands at -1 does not matter."""
        batch, heads = self.scales.shape[:2]
        slots = slots.clamp(min=0).expand(-1, heads, -1)
        row, head = torch.arange(batch, device=slots.device)[:, None, None], torch.arange(heads, device=slots.device)[:, None]
        codes = self.data.unflatten(4, (TILE, QUAD))[row, head, slots // TILE, :, slots % TILE]
        scales, kept = self.scales.gather(2, slots), slots.shape[2]
        if 2 * (kept + TILE) < self.scales.shape[2]:
            self.data, self.scales = self.data[:, :, :0], self.scales[:, :, :0]
        self.n = 0
        self._write(codes, scales)

    def _write(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Appends bytes ``(batch, kv_heads, new, head_dim / 4, 4)`` and their scales ``(batch, kv_heads, new)``."""
        new = codes.shape[2]
        self._reserve(self.n + new)
        self.scales[:, :, self.n : self.n + new] = scales
        done = 0
        while done < new:
            at, lane = divmod(self.n + done, TILE)
            if lane == 0 and new - done >= TILE:
                tiles = (new - done) // TILE
                part = codes[:, :, done : done + tiles * TILE].unflatten(2, (tiles, TILE)).transpose(3, 4)
                self.data[:, :, at : at + tiles] = part.flatten(4)
                done += tiles * TILE
            else:
                self.data[:, :, at, :, lane * QUAD : (lane + 1) * QUAD] = codes[:, :, done]
                done += 1
        self.n += new

    def _reserve(self, n: int) -> None:
        have = self.data.shape[2] * TILE
        if n > have:
            tiles = max(-(-n // TILE), 2 * self.data.shape[2]) + TILE
            shape = (*self.data.shape[:2], tiles, *self.data.shape[3:])
            data = empty(shape, torch.uint8, self.data.device)
            data[:, :, : self.data.shape[2]] = self.data
            data[:, :, self.data.shape[2] :] = ZERO
            scales = self.scales.new_zeros(*self.scales.shape[:2], tiles * TILE)
            scales[:, :, :have] = self.scales
            self.data, self.scales = data, scales

    def keys(self) -> torch.Tensor:
        """The keys as the bytes have them, float32 ``(batch, kv_heads, n, head_dim)``: for devices without a byte kernel."""
        codes = self.data.unflatten(4, (TILE, QUAD)).transpose(3, 4).flatten(4).flatten(2, 3)[:, :, : self.n]
        return (codes.float() - ZERO) * self.scales[:, :, : self.n, None]

    @property
    def bytes(self) -> int:
        """Bytes that one vote over all tokens reads."""
        return self.scales[:, :, : self.n].numel() * self._width

    def bytes_of(self, slots: torch.Tensor) -> int:
        """Bytes that the logits of ``slots`` (batch, kv_heads, k), ascending, -1 for none, read: whole tiles."""
        tiles = slots // TILE  # -1 stays
        first = int((tiles[..., :1] >= 0).sum())
        return (first + int((tiles[..., 1:] > tiles[..., :-1]).sum())) * TILE * self._width

    @property
    def _width(self) -> int:
        """Bytes of a token: a byte per dimension, and the scale."""
        return self.data.shape[3] * QUAD + 4
